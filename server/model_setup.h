// LoadedModel: everything that a configuration names, brought up and ready to run.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/model_runner.h"
#include "models/chat_template.h"
#include "models/tokenizer.h"
#include "server/metrics.h"
#include "server/options.h"

namespace innerq {

// A model's directory, read and checked, but for its weights.
struct ModelFiles {
  ModelConfig config;
  std::shared_ptr<const Tokenizer> tokenizer;
  std::shared_ptr<const ChatTemplate> chat_template;  // null: the model cannot chat
  std::vector<int32_t> stop_token_ids;
  std::shared_ptr<const Checkpoint> checkpoint;
};

// Errors: as of the parts; the message says which.
Result<ModelFiles> OpenModel(const Options& options);

// What is loaded from disk, before an engine runs it; the checkpoint has been let go.
struct ModelParts : ModelFiles {
  std::unique_ptr<ModelRunner> runner;
};

// Loads tokenizer, template and weights. Shows a progress bar on standard error if that is a
// terminal. `interrupted` is asked while weights are read; true ends it with the error "cancelled".
// Errors: as of the parts; the message says which.
Result<ModelParts> LoadParts(
    const Options& options, const std::function<bool()>& interrupted = [] { return false; });

// Loads the weights alone. Progress, interruption and errors as of LoadParts.
Result<std::unique_ptr<ModelRunner>> LoadWeights(const Options& options,
                                                 std::shared_ptr<const Checkpoint> checkpoint,
                                                 const std::function<bool()>& interrupted);
// Makes random weights of a shape instead. Progress and interruption alike.
Result<std::unique_ptr<ModelRunner>> MakeRandomWeights(const Options& options,
                                                       const ModelConfig& shape, uint64_t seed,
                                                       const std::function<bool()>& interrupted);

struct LoadedModel {
  ModelConfig config;
  std::shared_ptr<const Tokenizer> tokenizer;
  std::shared_ptr<const ChatTemplate> chat_template;  // null: the model cannot chat
  std::vector<int32_t> stop_token_ids;
  ModelReport report;
  CacheInfo cache;
  std::unique_ptr<Engine> engine;
};

// Starts the engine. Errors: as of Engine::Create.
Result<LoadedModel> StartModel(ModelParts parts);

// Both, one after the other.
Result<LoadedModel> LoadModel(const Options& options);

// How matrices of codes are stored, e.g. "pow2 3-bit, groups of 64, activations 16-bit (3.25 bits
// per weight)", with scales counted, and "; head uniform 8-bit" if it is coded. `config.low_bit`
// must be there.
std::string DescribeLowBit(const ModelConfig& config);
// And what becomes of them.
std::string DescribeLowBit(const Options& options, const ModelConfig& config);

// The start-up report, a line each: model, weights that are codes, backend, cache per range of
// layers, pools, context.
std::vector<std::string> DescribeModel(const Options& options, const ModelConfig& config,
                                       const ModelReport& report);

// The layout of a configuration's cache over a model, without loading weights.
Result<KvLayout> PlanLayout(const Options& options, const ModelConfig& config);

// The cache's layers as text, equal neighbours together: "layers 0-1: keys 8-bit symmetric ...".
std::vector<std::string> DescribeCache(const KvLayout& layout);

}  // namespace innerq
