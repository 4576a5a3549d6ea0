// Every task of `innerq eval` on the demo model, small.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <regex>

#include "server/eval_command.h"
#include "server/eval_data.h"
#include "tests/models/test_files.h"

namespace innerq::eval_test {
namespace {

using Json = nlohmann::json;
using Task = EvalArgs::Task;

std::string Config(const std::string& name) {
  return std::string(INNERQ_SOURCE_DIR) + "/configs/" + name + ".json";
}

std::filesystem::path DemoFile(const std::string& name) {
  return std::filesystem::path(INNERQ_SOURCE_DIR) / "models/demo/eval" / name;
}

std::filesystem::path Shots() {
  return std::filesystem::path(INNERQ_SOURCE_DIR) / "tests/eval/shots.jsonl";
}

ConfigSource Source() { return {.file = Config("demo"), .overrides = {"backend.threads=1"}}; }

// What a successful evaluation printed and wrote.
struct Outputs {
  std::string table;
  Json json;
  std::string svg;
};

Outputs Measure(EvalArgs args, const ConfigSource& source = Source()) {
  const TemporaryDirectory directory;
  args.output.json = directory.path() / "out.json";
  args.output.plot = directory.path() / "out.svg";
  testing::internal::CaptureStdout();
  const Result<void> done = Evaluate(source, args, [] { return false; });
  Outputs outputs{testing::internal::GetCapturedStdout(), {}, {}};
  EXPECT_TRUE(done.ok()) << (done.ok() ? "" : done.error().message);
  if (!done.ok()) return outputs;
  outputs.json = Json::parse(ReadAll(args.output.json));
  outputs.svg = ReadAll(args.output.plot);
  return outputs;
}

Error Refusal(const EvalArgs& args, const ConfigSource& source = Source()) {
  testing::internal::CaptureStdout();
  const Result<void> done = Evaluate(source, args, [] { return false; });
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "");
  EXPECT_FALSE(done.ok());
  return done.ok() ? Error{} : done.error();
}

#if defined(INNERQ_SANITIZED)
constexpr int64_t kContext = 224;
#else
constexpr int64_t kContext = 600;
#endif

EvalArgs Scoring(Task task) {
  EvalArgs args;
  args.task = task;
  args.scoring.texts = {DemoFile("recall.jsonl")};
  args.scoring.limit = 1;
  args.scoring.context = kContext;
  return args;
}

TEST(Eval, KlTellsCachesApartAndFindsAnF16CacheEqual) {
  EvalArgs args = Scoring(Task::kKl);
  args.output.caches = {Config("int8"), Config("innerq_base"), Config("fp16"),
                        Config("innerq_base") + ",key.bits=2,value.bits=2"};
  const Outputs outputs = Measure(args);
  EXPECT_EQ(outputs.json["task"], "kl");
  EXPECT_EQ(outputs.json["model"], "innerq");
  EXPECT_EQ(outputs.json["settings"]["reference"], "fp16");
  EXPECT_EQ(outputs.json["settings"]["context"], kContext);
  const Json& caches = outputs.json["caches"];
  ASSERT_EQ(caches.size(), 4u);
  EXPECT_EQ(caches[0]["cache"], "fp16") << "the reference comes first";
  EXPECT_EQ(caches[0]["kl_mean"], 0.0);
  EXPECT_EQ(caches[0]["top1_agreement"], 1.0);
  EXPECT_TRUE(caches[0]["kl_mean_quantized"].is_null());
  EXPECT_EQ(caches[1]["cache"], "int8");
  EXPECT_EQ(caches[2]["cache"], "innerq_base");
  EXPECT_EQ(caches[3]["cache"], "innerq_base,key.bits=2,value.bits=2");
  EXPECT_EQ(caches[2]["sealed_bits"], 3.5);
  for (size_t i = 1; i < 4; ++i) {
    EXPECT_GT(caches[i]["kl_mean"], i == 1 ? 0.0 : caches[i - 1]["kl_mean"].get<double>());
    EXPECT_GT(caches[i]["kl_mean_quantized"], caches[i]["kl_mean"].get<double>());
    EXPECT_GE(caches[i]["kl_p99"], caches[i]["kl_median"].get<double>());
    EXPECT_LT(caches[i]["effective_bits"], 16.0);
    EXPECT_GT(caches[i]["effective_bits"], caches[i]["sealed_bits"].get<double>());
    EXPECT_EQ(caches[i]["all"]["tokens"], caches[0]["all"]["tokens"]);
    EXPECT_LT(caches[i]["quantized"]["tokens"], caches[i]["all"]["tokens"].get<int64_t>());
  }
  for (const char* text : {"| cache ", "| fp16 ", "| innerq_base,key.bits=2,value.bits=2 |"}) {
    EXPECT_NE(outputs.table.find(text), std::string::npos) << text << "\n" << outputs.table;
  }
  EXPECT_NE(outputs.svg.find("innerq_base,key.bits=2"), std::string::npos);
  EXPECT_NE(outputs.svg.find("fp16 = 0"), std::string::npos) << "no place on a logarithmic axis";
}

TEST(Eval, PerplexityMeasuresTheConfigurationsOwnCacheAndSkipsWhatItIsTold) {
  const Outputs all = Measure(Scoring(Task::kPerplexity));
  ASSERT_EQ(all.json["caches"].size(), 2u);
  EXPECT_EQ(all.json["caches"][0]["cache"], "fp16");
  EXPECT_EQ(all.json["caches"][1]["cache"], "demo");
  const double perplexity = all.json["caches"][0]["perplexity"];
  EXPECT_GT(perplexity, 1.5);
  EXPECT_LT(perplexity, 40);
  EXPECT_EQ(all.json["caches"][0]["increase"], 0.0);
  EXPECT_NEAR(all.json["caches"][0]["all"]["mean_nll"], std::log(perplexity), 1e-9);

  EvalArgs args = Scoring(Task::kPerplexity);
  args.scoring.skip = 161;  // the first token that is predicted from a quantized page
  const Outputs rest = Measure(args);
  const Json& demo = rest.json["caches"][1];
  EXPECT_EQ(demo["all"], demo["quantized"]);
  EXPECT_EQ(demo["all"], all.json["caches"][1]["quantized"]);
  EXPECT_EQ(demo["increase"], demo["increase_quantized"]) << "the same tokens of the reference";
  EXPECT_EQ(demo["increase"], all.json["caches"][1]["increase_quantized"]);
  EXPECT_TRUE(all.json["caches"][0]["increase_quantized"].is_null());
  EXPECT_LT(demo["all"]["tokens"], all.json["caches"][1]["all"]["tokens"].get<int64_t>());
}

TEST(Eval, Gsm8kCountsTheNumbersThatAreRight) {
  EvalArgs args;
  args.task = Task::kGsm8k;
  args.problems.data = DemoFile("problems.jsonl");
  args.problems.limit = 6;
  args.problems.max_tokens = 120;
  const Outputs plain = Measure(args);
  args.problems.shots = Shots();
  args.problems.num_shots = 2;
  args.problems.chat = true;
  const Outputs chat = Measure(args);
  EXPECT_EQ(chat.json["settings"]["shots"], 2);
  for (const Outputs* outputs : {&plain, &chat}) {
    EXPECT_EQ(outputs->json["settings"]["problems"], 6);
    for (const Json& cache : outputs->json["caches"]) {
      EXPECT_GE(cache["accuracy"], 0.6) << outputs->table;
      EXPECT_EQ(cache["accuracy"], cache["right"].get<double>() / 6);
      EXPECT_EQ(cache["ended"], 1.0);
    }
    EXPECT_EQ(outputs->json["caches"][0]["as_reference"], 1.0);
  }
  args.problems.max_tokens = 1;
  const Outputs cut = Measure(args);
  for (const Json& cache : cut.json["caches"]) {
    EXPECT_EQ(cache["ended"], 0.0);
    EXPECT_EQ(cache["as_reference"], 0.0) << "no number is not the same number";
  }
}

TEST(Eval, RecallFindsNeedlesAtEveryDepth) {
  EvalArgs args;
  args.task = Task::kRecall;
  args.recall.lengths = {128, kContext};
  args.recall.depths = {0, 50, 100};
  args.recall.trials = 2;
  const Outputs outputs = Measure(args);
  const Json& caches = outputs.json["caches"];
  ASSERT_EQ(caches.size(), 2u);
  for (const Json& cache : caches) {
    EXPECT_GE(cache["found"], 0.6) << outputs.table;
    ASSERT_EQ(cache["grid"].size(), 6u);
    double sum = 0;
    for (const Json& cell : cache["grid"]) sum += cell["found"].get<double>();
    EXPECT_NEAR(sum / 6, cache["found"], 1e-12);
    // In the middle of the longer text, if that is longer than the windows by far.
    const int quantized = cache["cache"] != "fp16" && kContext > 400 ? 2 : 0;
    EXPECT_EQ(cache["needles_quantized"], quantized);
    EXPECT_EQ(cache["found_quantized"].is_null(), quantized == 0);
    EXPECT_TRUE(cache.contains("found_length_128"));
    EXPECT_TRUE(cache.contains("found_depth_50"));
  }
}

TEST(Eval, RecallRefusesLengthsThatHoldNoNeedle) {
  EvalArgs args;
  args.task = Task::kRecall;
  args.recall.trials = 1;
  args.recall.max_tokens = 1;
  for (const bool chat : {false, true}) {
    args.recall.chat = chat;
    args.recall.lengths = {1};
    const std::string message = Refusal(args).message;
    std::smatch least;
    ASSERT_TRUE(std::regex_search(message, least, std::regex("take (\\d+) tokens, more than 1$")))
        << message;
    args.recall.lengths = {std::stoll(least[1]) - 1};
    EXPECT_EQ(Refusal(args).param, "");
    ++args.recall.lengths[0];
    EXPECT_EQ(Measure(args).json["caches"].size(), 2u);
  }
}

TEST(Eval, LonggenFollowsTheReferencesAnswer) {
  EvalArgs args;
  args.task = Task::kLonggen;
  args.long_answers.prompts = {"The code of the red lantern is 4821."};
  args.long_answers.texts = {DemoFile("recall.jsonl")};
  args.long_answers.limit = 1;
  args.long_answers.prompt_tokens = 150;
  args.long_answers.tokens = 40;
  args.output.caches = {Config("innerq_base"), Config("innerq_base") + ",prefill=exact"};
  const Outputs outputs = Measure(args);
  EXPECT_EQ(outputs.json["settings"]["prompts"], 2);
  const Json& caches = outputs.json["caches"];
  ASSERT_EQ(caches.size(), 3u);
  EXPECT_EQ(caches[0]["same_tokens"], 40.0) << "the reference goes along with itself";
  EXPECT_EQ(caches[0]["kl_mean"], 0.0);
  for (const Json& cache : caches) {
    ASSERT_EQ(cache["by_position"].size(), 16u);
    int64_t next = 0;
    for (const Json& stretch : cache["by_position"]) {
      EXPECT_EQ(stretch["begin"], next);
      next = stretch["end"];
      EXPECT_EQ(stretch["tokens"], 2 * (next - stretch["begin"].get<int64_t>()));
    }
    EXPECT_EQ(next, 40);
    EXPECT_EQ(cache["all"]["tokens"], 80);
  }
  EXPECT_GT(caches[1]["kl_mean"], 0.0);
  EXPECT_EQ(caches[1]["kl_mean_0_10"], 0.0) << "positions that read no quantized page";

  args.long_answers.temperature = 1;
  const Outputs sampled = Measure(args);
  for (const Json& cache : sampled.json["caches"]) EXPECT_TRUE(cache["same_tokens"].is_null());
  EXPECT_EQ(sampled.table.find("would not have chosen"), std::string::npos) << sampled.table;
}

TEST(Eval, RefusesWhatItCannotMeasureBeforeItLoadsTheModel) {
  EvalArgs args = Scoring(Task::kKl);
  args.scoring.texts = {"/nonexistent.txt"};
  EXPECT_EQ(Refusal(args).message, "cannot read /nonexistent.txt: No such file or directory");
  args = Scoring(Task::kKl);
  args.output.caches = {Config("innerq_base") + ",key.bitz=2"};
  EXPECT_EQ(Refusal(args).param, "kv_cache.key.bitz");
  args.output.caches = {Config("innerq_base") + ",key.group_size=128"};
  EXPECT_NE(Refusal(args).message.find("cache innerq_base,key.group_size=128: "),
            std::string::npos);
  args.output.caches = {Config("kivi"), Config("kivi")};
  EXPECT_EQ(Refusal(args).message, "--cache: two caches are called kivi");
  args.output.caches = {Config("innerq_base") + ",prefill=exact"};
  EXPECT_NE(Refusal(args).message.find("prefill exact"), std::string::npos);
  args.output.caches = {Config("kivi")};
  ConfigSource source = Source();
  source.overrides.push_back("kv_cache.key.bits=2");
  EXPECT_NE(Refusal(args, source).message.find("--cache FILE,key.bits=2"), std::string::npos);
  args.scoring.context = 1 << 20;
  EXPECT_NE(Refusal(args).message.find("longest context, 4096"), std::string::npos);
  args.scoring.context = kContext;
  args.scoring.skip = 100'000;
  EXPECT_EQ(Refusal(args).message, "no token is left to score");
  args.output.json = "/nonexistent/out.json";
  const Error unwritable = Refusal(args);
  EXPECT_EQ(unwritable.message, "cannot write /nonexistent/out.json: No such file or directory");
  testing::internal::CaptureStderr();
  EXPECT_EQ(ReportError(unwritable), 1);
  testing::internal::GetCapturedStderr();

  args = {};
  args.task = Task::kLonggen;
  EXPECT_EQ(Refusal(args).message, "--prompt or --text is required");
  args.task = Task::kGsm8k;
  args.problems.data = DemoFile("problems.jsonl");
  args.problems.shots = Shots();
  args.problems.num_shots = 1000;
  EXPECT_NE(Refusal(args).message.find("has 8 problems, not 1000"), std::string::npos);
  args.problems.shots = args.problems.data;
  args.problems.num_shots = 1;
  EXPECT_NE(Refusal(args).message.find("shows how to solve a problem of --data: "),
            std::string::npos);
  args.task = Task::kRecall;
  args.recall.lengths = {5000};
  args.recall.trials = 1;
  EXPECT_NE(Refusal(args).message.find("the longest context is 4096"), std::string::npos);

  args = Scoring(Task::kKl);
  const TemporaryDirectory directory;
  args.output.json = directory.path() / "a";
  args.output.plot = directory.path() / "." / "a";
  EXPECT_EQ(Refusal(args).message,
            "--json and --plot name the same file, " + args.output.json.string());
  EXPECT_FALSE(std::filesystem::exists(args.output.json));
}

TEST(Eval, AnInterruptedRunLeavesNoFileAndAFullDiskIsAnError) {
  const TemporaryDirectory directory;
  EvalArgs args = Scoring(Task::kKl);
  args.output.json = directory.path() / "out.json";
  testing::internal::CaptureStdout();
  const Result<void> stopped = Evaluate(Source(), args, [] { return true; });
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "");
  ASSERT_FALSE(stopped.ok());
  EXPECT_EQ(stopped.error().code, ErrorCode::kCancelled);
  EXPECT_FALSE(std::filesystem::exists(args.output.json));

  args.scoring.context = 64;
  args.output.json = "/dev/full";
  testing::internal::CaptureStdout();
  const Result<void> full = Evaluate(Source(), args, [] { return false; });
  EXPECT_NE(testing::internal::GetCapturedStdout().find("| fp16 "), std::string::npos)
      << "the table is not lost";
  ASSERT_FALSE(full.ok());
  EXPECT_EQ(full.error().message, "cannot write /dev/full: No space left on device");
}

}  // namespace
}  // namespace innerq::eval_test
