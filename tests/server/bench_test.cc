// `innerq bench`, small. No time is asserted.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "server/bench_command.h"
#include "server/bench_shapes.h"
#include "tests/models/test_files.h"

namespace innerq {
namespace {

using Json = nlohmann::json;

std::string Config(const std::string& name) {
  return std::string(INNERQ_SOURCE_DIR) + "/configs/" + name + ".json";
}

// The reference device has no loop that reads a gigabyte first.
ConfigSource Source() {
  return {.file = Config("demo"), .overrides = {"backend.device=reference"}};
}

// With a model whose two layers sanitizers run thousands of tokens of.
ConfigSource TinySource() {
  ConfigSource source = Source();
  source.overrides.push_back("model.path=" + TinyLlamaDirectory().string());
  return source;
}

BenchArgs Small() {
  BenchArgs args;
  args.prompt = 40;
  args.generate = 3;
  args.runs = 2;
  return args;
}

bool Never() { return false; }

// What a successful benchmark printed and wrote.
struct Outputs {
  std::string table;
  Json json;
};

Outputs Measure(BenchArgs args, const ConfigSource& source = Source()) {
  const TemporaryDirectory directory;
  args.json = directory.path() / "out.json";
  testing::internal::CaptureStdout();
  const Result<void> done = Benchmark(source, args, "1.2.3", Never);
  Outputs outputs{testing::internal::GetCapturedStdout(), {}};
  EXPECT_TRUE(done.ok()) << (done.ok() ? "" : done.error().message);
  if (done.ok()) outputs.json = Json::parse(ReadAll(args.json));
  return outputs;
}

Error Refusal(const BenchArgs& args, const ConfigSource& source = Source()) {
  testing::internal::CaptureStdout();
  const Result<void> done = Benchmark(source, args, "1.2.3", Never);
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "");
  EXPECT_FALSE(done.ok());
  return done.ok() ? Error{} : done.error();
}

TEST(Bench, MeasuresEveryCacheAtEveryDepthWithEveryBatch) {
  BenchArgs args = Small();
  args.caches = {Config("fp16"), Config("innerq_base") + ",value.bits=2"};
  args.batches = {1, 2};
  args.depths = {0, 130};
  const Outputs outputs = Measure(args, TinySource());
  const Json& json = outputs.json;
  EXPECT_EQ(json["task"], "bench");
  EXPECT_EQ(json["model"], "innerq");
  EXPECT_EQ(json["device"], "reference");
  EXPECT_EQ(json["version"], "1.2.3");
  EXPECT_EQ(json["threads"], 1);
  EXPECT_EQ(json["layers"], 2);
  EXPECT_EQ(json["settings"]["weights"], "stored");
  EXPECT_EQ(json["settings"]["prompt"], 40);
  EXPECT_EQ(json["settings"]["runs"], 2);
  EXPECT_TRUE(json["read_bytes_per_second"].is_null());
  EXPECT_NE(outputs.table.find("no floor"), std::string::npos) << outputs.table;
  EXPECT_EQ(outputs.table.find("of floor"), std::string::npos) << outputs.table;
  const Json& rows = json["caches"];
  ASSERT_EQ(rows.size(), 8u);
  for (size_t i = 0; i < rows.size(); ++i) {
    const Json& row = rows[i];
    EXPECT_EQ(row["cache"], i % 2 == 0 ? "fp16" : "innerq_base,value.bits=2");
    EXPECT_EQ(row["batch"], i / 2 % 2 == 0 ? 1 : 2);
    EXPECT_EQ(row["depth"], i < 4 ? 0 : 130);
    for (const char* key : {"prefill_tokens_per_second", "decode_tokens_per_second", "step_ms",
                            "total_tokens_per_second", "cache_bytes", "step_cache_bytes"}) {
      EXPECT_GT(row[key], 0.0) << key;
    }
    EXPECT_NEAR(row["decode_tokens_per_second"].get<double>() * row["step_ms"].get<double>(),
                1000 * row["batch"].get<double>(), 1e-6);
    EXPECT_FALSE(row.contains("floor_share"));
    ASSERT_EQ(row["runs"].size(), 2u);
    EXPECT_EQ(row["runs"][1]["step_seconds"].size(), 3u);
    EXPECT_GT(row["runs"][1]["prefill_seconds"], 0.0);
  }
  EXPECT_EQ(rows[0]["sealed_bits"], 16.0);
  EXPECT_EQ(rows[1]["sealed_bits"], 3.0);
  EXPECT_EQ(rows[0]["step_cache_bytes"], rows[1]["step_cache_bytes"]) << "nothing is sealed yet";
  EXPECT_GT(rows[4]["step_cache_bytes"], rows[5]["step_cache_bytes"].get<double>());
  EXPECT_EQ(rows[6]["step_cache_bytes"], 2 * rows[4]["step_cache_bytes"].get<double>());
}

#if !defined(INNERQ_SANITIZED)  // a hundred million random weights take a minute
TEST(Bench, TakesAShapeWithRandomWeightsAndFewerLayers) {
  BenchArgs args = Small();
  args.shape = "tinyllama-1.1b";
  args.layers = 1;
  args.prompt = 2;
  args.generate = 1;
  args.runs = 1;
  const Outputs outputs = Measure(args);
  EXPECT_EQ(outputs.json["model"], "tinyllama-1.1b");
  EXPECT_EQ(outputs.json["layers"], 1);
  EXPECT_EQ(outputs.json["layers_of_model"], 22);
  EXPECT_EQ(outputs.json["settings"]["weights"], "random bf16");
  EXPECT_EQ(outputs.json["parameters"], 1100048384 - 21 * 44044288);
  EXPECT_EQ(outputs.json["caches"][0]["cache"], "demo") << "the configuration's own";
  EXPECT_NE(outputs.table.find("tinyllama-1.1b, 1 layers of 22, random bf16 weights"),
            std::string::npos)
      << outputs.table;
}

TEST(Bench, TakesAShapeWithRandomCodes) {
  BenchArgs args = Small();
  args.shape = "tinyllama-1.1b";
  args.layers = 1;
  args.weights = {.scheme = "uniform", .bits = 3, .group_size = 128, .activation_bits = 8};
  args.prompt = 2;
  args.generate = 1;
  args.runs = 1;
  ConfigSource source = Source();
  source.overrides = {"backend.threads=1"};  // on the CPU, which holds codes as bits
  const Outputs outputs = Measure(args, source);
  EXPECT_EQ(outputs.json["settings"]["weights"], "random uniform 3-bit");
  EXPECT_EQ(outputs.json["parameters"], 1100048384 - 21 * 44044288);

  args.weights.head_bits = 8;
  const Outputs with_head = Measure(args, source);
  EXPECT_EQ(with_head.json["settings"]["weights"], "random uniform 3-bit (8-bit head)");
  // The head of BF16 against one of bytes and of scales for every 128 of them.
  const auto step_bytes = [](const Outputs& of) -> double {
    return of.json["caches"][0]["step_weight_bytes"];
  };
  EXPECT_EQ(step_bytes(outputs) - step_bytes(with_head),
            32000 * (2048 * 2 - 2048 - 2048 / 128 * 2));
}

// The shadow of the gigabyte that is read would be several.
TEST(Bench, ComparesDecodeWithReadingItsBytesOnce) {
  ConfigSource source = Source();
  source.overrides = {"backend.threads=1"};
  const Outputs outputs = Measure(Small(), source);
  const double bandwidth = outputs.json["read_bytes_per_second"];
  const Json& row = outputs.json["caches"][0];
  const double floor_ms = row["floor_ms"];
  const double bytes =
      row["step_weight_bytes"].get<double>() + row["step_cache_bytes"].get<double>();
  EXPECT_NEAR(floor_ms, 1000 * bytes / bandwidth, 1e-9);
  EXPECT_NEAR(row["floor_share"], floor_ms / row["step_ms"].get<double>(), 1e-9);
  EXPECT_NE(outputs.table.find("| of floor |"), std::string::npos) << outputs.table;
}
#endif

TEST(Bench, ShapesHaveTheParametersOfTheirModels) {
  const auto parameters = [](const char* name) { return FindShape(name)->num_parameters(); };
  EXPECT_EQ(parameters("llama-3.1-8b"), 8'030'261'248);
  EXPECT_EQ(parameters("llama-3.2-3b"), 3'212'749'824);
  EXPECT_EQ(parameters("llama-3.2-1b"), 1'235'814'400);
  EXPECT_EQ(parameters("llama-2-7b"), 6'738'415'616);
  EXPECT_EQ(parameters("tinyllama-1.1b"), 1'100'048'384);
  EXPECT_EQ(FindShape("gpt-2").error().message,
            "--shape: unknown shape \"gpt-2\"; there are " + ShapeNames());
}

TEST(Bench, RefusesWhatItCannotMeasureBeforeThereAreWeights) {
  BenchArgs args = Small();
  args.shape = "llama";
  EXPECT_NE(Refusal(args).message.find("tinyllama-1.1b"), std::string::npos);
  args.shape = "llama-2-7b";
  args.layers = 33;
  EXPECT_EQ(Refusal(args).message, "--layers: llama-2-7b has 32, not 33");
  args.layers = 2;
  args.prompt = 4000;
  args.generate = 97;
  EXPECT_EQ(Refusal(args).message,
            "--depth, --prompt and --generate: 0 + 4000 + 97 tokens are more than the longest "
            "context, 4096");
  ConfigSource source = Source();
  source.overrides.push_back("model.path=models/demo");
  EXPECT_NE(Refusal(args, source).message.find("not used with --shape"), std::string::npos);

  args = Small();
  source = Source();
  source.overrides.push_back("scheduler.max_context=42");
  EXPECT_NE(Refusal(args, source).message.find("longest context, 42"), std::string::npos);
  source = Source();
  source.overrides.push_back("kv_cache.memory=1GiB");
  EXPECT_EQ(Refusal(args, source).message,
            "kv_cache.memory=1GiB: a benchmark takes the memory that its sequences need");
  args.caches = {Config("kivi") + ",memory=2GiB"};
  EXPECT_EQ(Refusal(args).message,
            "kv_cache.memory=2GiB: a benchmark takes the memory that its sequences need");
  args.caches = {Config("kivi"), Config("kivi")};
  EXPECT_EQ(Refusal(args).message, "--cache: two caches are called kivi");
  args.caches = {Config("innerq_base") + ",key.group_size=128"};
  const Error wide = Refusal(args);
  EXPECT_EQ(wide.param, "kv_cache.key.group_size");
  EXPECT_NE(wide.message.find("cache innerq_base,key.group_size=128: "), std::string::npos);
  args.caches = {"none.json"};
  EXPECT_EQ(Refusal(args).code, ErrorCode::kNotFound);

  args = Small();
  args.batches = {1, 65};
  EXPECT_EQ(Refusal(args).message,
            "--batch: 65 sequences are more than run at once, scheduler.max_sequences is 64");
  source = Source();
  source.overrides.push_back("scheduler.max_sequences=65536");
  source.overrides.push_back("scheduler.max_batch_tokens=65536");
  args.batches = {65536};
  args.shape = "llama-2-7b";
  args.prompt = 4000;
  const Error large = Refusal(args, source);
  EXPECT_EQ(large.code, ErrorCode::kResourceExhausted);
  EXPECT_NE(large.message.find("are more than reference has left"), std::string::npos)
      << large.message;
  args.json = "/nonexistent/out.json";
  EXPECT_EQ(Refusal(args).message, "cannot write /nonexistent/out.json: No such file or directory");
}

TEST(Bench, AnInterruptedRunLeavesNoFileAndAFullDiskIsAnError) {
  const TemporaryDirectory directory;
  BenchArgs args = Small();
  args.json = "/dev/full";
  int64_t asked = 0;
  testing::internal::CaptureStdout();
  const Result<void> full = Benchmark(TinySource(), args, "1.2.3", [&] { return ++asked < 0; });
  EXPECT_NE(testing::internal::GetCapturedStdout().find("| demo "), std::string::npos)
      << "the table is not lost";
  ASSERT_FALSE(full.ok());
  EXPECT_EQ(full.error().message, "cannot write /dev/full: No space left on device");

  args.json = directory.path() / "out.json";
  for (const int64_t last : {int64_t{1}, asked - 1}) {  // while weights are loaded, in the last run
    asked = 0;
    testing::internal::CaptureStdout();
    const Result<void> stopped =
        Benchmark(TinySource(), args, "1.2.3", [&] { return ++asked == last; });
    EXPECT_EQ(testing::internal::GetCapturedStdout(), "");
    ASSERT_FALSE(stopped.ok());
    EXPECT_EQ(stopped.error().code, ErrorCode::kCancelled);
    EXPECT_EQ(stopped.error().message, "interrupted");
    EXPECT_FALSE(std::filesystem::exists(args.json));
  }
}

}  // namespace
}  // namespace innerq
