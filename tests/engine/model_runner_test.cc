#include "engine/model_runner.h"

#include <algorithm>

#include "gtest/gtest.h"
#include "tests/engine/engine_test_util.h"
#include "tests/models/low_bit_files.h"
#include "tests/models/test_files.h"

namespace innerq {
namespace {

TEST(ModelRunner, ReportsWhatCameUp) {
  ModelRunnerOptions options = TinyOptions();
  options.dtype = WeightFormat::kF32;
  int64_t last_done = 0, total = 0;
  options.progress = [&](int64_t done, int64_t of) {
    EXPECT_GT(done, last_done);
    last_done = done;
    total = of;
    return true;
  };
  const auto runner = ModelRunner::Create(TinyCheckpoint(), options).value();
  EXPECT_EQ(last_done, total);
  EXPECT_GT(total, 0);
  const ModelReport& report = runner->report();
  EXPECT_EQ(report.backend.substr(0, 4), "cpu/");
  EXPECT_EQ(report.max_context, 256) << "the model's longest context fits";
  EXPECT_EQ(runner->engine_options().max_context, 256);
  EXPECT_EQ(report.open_page_bytes, 2 * 2 * 2 * 64 * 32 * 2);
  EXPECT_EQ(report.open_bytes_per_token, 2 * 2 * 2 * 64 * 2);
  EXPECT_EQ(report.sealed_bits_per_element, 3.5) << "3-bit codes, one F16 scale per 32";
  EXPECT_EQ(report.sealed_bytes_per_token, 2 * 2 * 2 * 64 * 3.5 / 8);
  EXPECT_GT(report.parameters, 64 * 128);
  EXPECT_GT(report.weight_bytes, report.parameters * 4) << "all in F32";
  EXPECT_LE(report.pools.bytes, options.kv_cache.memory_bytes.value());
  EXPECT_EQ(runner->num_open_pages(), report.pools.open_pages);
  EXPECT_EQ(runner->num_sealed_pages(), report.pools.sealed_pages);
  EXPECT_EQ(runner->num_norm_slots(), report.pools.norm_slots);
  EXPECT_EQ(runner->vocab_size(), 128);
}

TEST(ModelRunner, HoldsCodesUnlessAFormatIsNamed) {
  const TemporaryDirectory directory;
  nlohmann::json config = nlohmann::json::parse(ReadAll(TinyLlamaDirectory() / "config.json"));
  const LowBitSpec spec{.bits = 3, .group_size = 32};
  config["quantization_config"] = QuantizationConfig(spec);
  WriteAll(directory.path() / "config.json", config.dump());
  WriteAll(directory.path() / "model.safetensors",
           Safetensors(StoreLayersAsCodes(spec, StoredTensors(*TinyCheckpoint())).coded));
  const auto checkpoint = Checkpoint::Open(directory.path()).value();
  const auto weight_bytes = [&](std::optional<WeightFormat> dtype) {
    ModelRunnerOptions options = TinyOptions();
    options.dtype = dtype;
    return ModelRunner::Create(checkpoint, options).value()->report().weight_bytes;
  };
  // Codes and scales of 3.5 bits in place of 16.
  const int64_t layers = checkpoint->config().num_layer_weights();
  const int64_t saved = layers * 2 - checkpoint->config().low_bit_bytes();
  EXPECT_GT(saved, layers);
  EXPECT_NEAR(static_cast<double>(weight_bytes(WeightFormat::kF16) - weight_bytes({})),
              static_cast<double>(saved), 0.1 * static_cast<double>(saved));
}

TEST(ModelRunner, TakesTheMemoryThatThereIsUseFor) {
  ModelRunnerOptions options = TinyOptions();
  options.kv_cache.memory_bytes.reset();
  for (const bool prefix_cache : {false, true}) {
    options.kv_cache.prefix_cache = prefix_cache;
    const auto runner = ModelRunner::Create(TinyCheckpoint(), options).value();
    const ModelReport& report = runner->report();
    EXPECT_EQ(report.max_context, 256);
    const PageCounts longest = WorstPeakPages(runner->layout(), 256, /*exact_prefill=*/false);
    const int64_t sequences = options.engine.max_sequences * (prefix_cache ? 2 : 1);
    EXPECT_GE(report.pools.open_pages, sequences * longest.open);
    EXPECT_LE(report.pools.open_pages, sequences * longest.open + 2 * 64 / 32);
    EXPECT_EQ(report.pools.sealed_pages, sequences * longest.sealed);
  }
}

// Of a context that no machine's memory holds: half of what there is, and nothing is allocated.
TEST(ModelRunner, TakesNoMoreThanHalfOfWhatTheWeightsLeave) {
  const TemporaryDirectory directory;
  nlohmann::json config = nlohmann::json::parse(ReadAll(TinyLlamaDirectory() / "config.json"));
  config["max_position_embeddings"] = int64_t{1} << 30;
  WriteAll(directory.path() / "config.json", config.dump());
  std::filesystem::copy(TinyLlamaDirectory() / "model.safetensors", directory.path());
  ModelRunnerOptions options = TinyOptions();
  options.kv_cache.memory_bytes.reset();
  options.engine.max_sequences = 4096;
  const ModelPlan plan = PlanModel(*Checkpoint::Open(directory.path()).value(), options).value();
  const auto available = static_cast<double>(plan.backend->available_bytes());
  EXPECT_GT(static_cast<double>(plan.pools.bytes), 0.25 * available);
  EXPECT_LT(static_cast<double>(plan.pools.bytes), 0.75 * available);
}

TEST(ModelRunner, LimitsTheContextToWhatTheCacheHolds) {
  ModelRunnerOptions options = TinyOptions();
  options.kv_cache.key.bits = options.kv_cache.value.bits = 16;
  options.kv_cache.memory_bytes = 5 * 32768 + 1000;
  // Six pages are asked for at least: a context that a quantized cache would begin to seal.
  EXPECT_EQ(ModelRunner::Create(TinyCheckpoint(), options).error().code,
            ErrorCode::kResourceExhausted);
  options.kv_cache.memory_bytes = 7 * 32768 + 1000;
  const auto runner = ModelRunner::Create(TinyCheckpoint(), options).value();
  EXPECT_EQ(runner->report().max_context, 7 * 32);
}

TEST(ModelRunner, ExplainsWhatItCannotDo) {
  const auto refused = [](ErrorCode code, const std::string& param,
                          const std::function<void(ModelRunnerOptions&)>& change) {
    ModelRunnerOptions options = TinyOptions();
    change(options);
    const auto result = ModelRunner::Create(TinyCheckpoint(), options);
    ASSERT_FALSE(result.ok()) << param;
    EXPECT_EQ(result.error().code, code) << result.error().message;
    EXPECT_EQ(result.error().param, param);
  };
  refused(ErrorCode::kInvalidArgument, "scheduler.max_context",
          [](auto& o) { o.engine.max_context = 257; });
  refused(ErrorCode::kInvalidArgument, "scheduler.max_context",
          [](auto& o) { o.engine.max_context = 1; });
  refused(ErrorCode::kResourceExhausted, "kv_cache.memory",
          [](auto& o) { o.kv_cache.memory_bytes = 100; });
  refused(ErrorCode::kInvalidArgument, "kv_cache.key.group_size",
          [](auto& o) { o.kv_cache.key.group_size = 128; });
  refused(ErrorCode::kInvalidArgument, "kv_cache.layers.0.range",
          [](auto& o) { o.kv_cache.layers = {{.first_layer = 0, .last_layer = 2}}; });
}

// Real kernels, and weights of which one token's are not finite.
TEST(ModelRunner, ATokenThatCannotBeCachedEndsItsRequestAlone) {
  const auto tiny = TinyLlamaDirectory();
  const TemporaryDirectory directory;
  std::string config = ReadAll(tiny / "config.json");
  const std::string tied = R"("tie_word_embeddings": true)";
  config.replace(config.find(tied), tied.size(), R"("tie_word_embeddings": false)");
  WriteAll(directory.path() / "config.json", config);
  std::vector<StoredTensor> tensors = StoredTensors(*TinyCheckpoint());
  const auto table = std::find_if(tensors.begin(), tensors.end(), [](const StoredTensor& tensor) {
    return tensor.name == "model.embed_tokens.weight";
  });
  StoredTensor head = *table;
  head.name = "lm_head.weight";
  constexpr size_t kRowBytes = 64 * 2;                                 // BF16
  table->bytes.replace(13 * kRowBytes, kRowBytes, kRowBytes, '\xff');  // NaN
  tensors.push_back(std::move(head));
  WriteAll(directory.path() / "model.safetensors", Safetensors(tensors));
  ModelRunnerOptions options = TinyOptions();
  options.engine.max_batch_tokens = 512;
  auto runner = ModelRunner::Create(Checkpoint::Open(directory.path()).value(), options).value();
  const EngineOptions engine_options = runner->engine_options();
  const auto engine = Engine::Create(engine_options, std::move(runner)).value();

  Request request = RequestOf(0, 8);
  request.sampling.logit_bias = {{13, -100.0f}};  // no answer says it
  std::vector<Request> requests(3, request);
  for (int32_t i = 0; i < 230; ++i) {
    for (Request& each : requests) each.prompt.push_back(20 + i % 91);
  }
  requests[1].prompt[70] = 13;
  requests[2].prompt[70] = 14;
  const Response alone = ReadAll(engine->Submit(requests[2]).value());
  requests[2].cache_salt = "computed again";
  const ResponseGroup group = engine->SubmitGroup(std::move(requests)).value();
  EXPECT_EQ(ReadAll(group.readers[0]).finish->reason, FinishReason::kLength);
  EXPECT_EQ(ReadAll(group.readers[1]).finish->reason, FinishReason::kError);
  ExpectSameEvents(ReadAll(group.readers[2]).events, alone.events);
}

TEST(PlanModel, SaysWhatWouldRunBeforeAnythingIsLoaded) {
  const auto checkpoint = TinyCheckpoint();
  const ModelPlan plan = PlanModel(*checkpoint, TinyOptions()).value();
  const auto runner = ModelRunner::Create(checkpoint, TinyOptions()).value();
  EXPECT_EQ(plan.backend->name(), runner->report().backend);
  EXPECT_EQ(plan.pools.open_pages, runner->num_open_pages());
  EXPECT_EQ(plan.pools.sealed_pages, runner->num_sealed_pages());
  EXPECT_EQ(plan.engine.max_context, runner->engine_options().max_context);
  EXPECT_EQ(plan.layout.num_layers(), 2);

  ModelRunnerOptions wrong = TinyOptions();
  wrong.backend.variant = "none";
  EXPECT_EQ(PlanModel(*checkpoint, wrong).error().param, "backend.variant");
  wrong = TinyOptions();
  wrong.engine.max_context = 1;
  EXPECT_EQ(PlanModel(*checkpoint, wrong).error().param, "scheduler.max_context");
}

TEST(ModelRunner, BringsUpFurtherCachesOnTheSameWeights) {
  auto first = ModelRunner::Create(TinyCheckpoint(), TinyOptions()).value();
  KvCacheOptions kv_cache = TinyOptions().kv_cache;
  kv_cache.key.bits = 8;
  const auto second = first->WithCache(kv_cache, {.max_context = 200}).value();
  EXPECT_EQ(first->layout().layer(0).key.bits, 3);
  EXPECT_EQ(second->layout().layer(0).key.bits, 8);
  EXPECT_EQ(second->engine_options().max_context, 200);
  EXPECT_EQ(second->engine_options().max_batch_tokens, 64);
  EXPECT_EQ(second->report().weight_bytes, first->report().weight_bytes);
  first.reset();
  EXPECT_EQ(second->WithCache(kv_cache, {.max_context = 256})->get()->report().max_context, 256)
      << "the weights live as long as any runner";
  EXPECT_EQ(second->WithCache(kv_cache, {.max_context = 257}).error().param,
            "scheduler.max_context");
  const auto small =
      second->WithCache(kv_cache, {.max_context = 200, .max_sequences = 1, .max_batch_tokens = 32});
  EXPECT_EQ((*small)->engine_options().max_sequences, 1);
  EXPECT_EQ((*small)->engine_options().max_batch_tokens, 32);
  EXPECT_EQ((*second->WithCache(kv_cache, {.max_context = 200, .max_sequences = 99}))
                ->engine_options()
                .max_sequences,
            4)
      << "no more than before";
  kv_cache.memory_bytes = 1000;
  EXPECT_EQ(second->WithCache(kv_cache, {.max_context = 200}).error().param, "kv_cache.memory");
}

TEST(ModelRunner, ServesRequestsThroughTheEngine) {
  for (const bool exact : {false, true}) {
    ModelRunnerOptions options = TinyOptions();
    options.kv_cache.exact_prefill = exact;
    auto runner = ModelRunner::Create(TinyCheckpoint(), options).value();
    const EngineOptions engine_options = runner->engine_options();
    EXPECT_EQ(engine_options.exact_prefill, exact);
    const auto engine = Engine::Create(engine_options, std::move(runner)).value();
    Request request = RequestOf(200, 56);  // fills the context
    request.sampling.temperature = 0;
    const Response first = ReadAll(engine->Submit(request).value());
    EXPECT_EQ(first.finish->reason, FinishReason::kLength);
    EXPECT_EQ(first.events.size(), 56u);
    const Response second = ReadAll(engine->Submit(request).value());
    EXPECT_EQ(second.tokens(), first.tokens());
  }
}

}  // namespace
}  // namespace innerq
