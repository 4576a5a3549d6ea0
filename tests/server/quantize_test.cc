// `innerq quantize` on the demo model, small.
#include "server/quantize_command.h"

#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <functional>
#include <regex>
#include <set>
#include <thread>
#include <vector>

#include "server/output_directory.h"
#include "tests/models/test_files.h"

namespace innerq {
namespace {

std::vector<std::filesystem::path> synced_files;  // in order

}  // namespace
}  // namespace innerq

// In place of the C library's, for all of this program.
extern "C" int fsync(int fd) {
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  innerq::synced_files.push_back(std::filesystem::read_symlink(link));
  return static_cast<int>(::syscall(SYS_fsync, fd));
}

namespace innerq {
namespace {

std::filesystem::path Demo() { return std::filesystem::path(INNERQ_SOURCE_DIR) / "models/demo"; }
std::filesystem::path Recall() { return Demo() / "eval/recall.jsonl"; }

#if defined(INNERQ_SANITIZED)
constexpr int64_t kTokens = 64;
#else
constexpr int64_t kTokens = 1024;
#endif

// What was printed about the models.
struct Measured {
  double perplexity_before = 0, perplexity = 0;
  double kl = 0;
  std::string text;
};

class QuantizeTest : public testing::Test {
 protected:
  QuantizeArgs Args(const std::string& name = "out") const {
    QuantizeArgs args;
    args.model = Demo();
    args.output = directory_.path() / name;
    args.weights.scheme = "pow2";
    args.calibration_tokens = args.evaluation_tokens = kTokens;
    args.threads = 1;
    return args;
  }

  // Runs what succeeds.
  static Measured Run(const QuantizeArgs& args) {
    testing::internal::CaptureStdout();
    const Result<void> done = Quantize(args, {[] { return false; }});
    Measured measured;
    measured.text = testing::internal::GetCapturedStdout();
    EXPECT_TRUE(done.ok()) << (done.ok() ? "" : done.error().message);
    std::smatch row;
    if (std::regex_search(measured.text, row, std::regex(R"(\| float +\| +([0-9.]+) \|)"))) {
      measured.perplexity_before = std::stod(row[1]);
    }
    const std::regex after("\\| " + args.weights.scheme + " " + std::to_string(args.weights.bits) +
                           R"( +\| +([0-9.]+) \| +([-+0-9.e]+) \+- )");
    if (std::regex_search(measured.text, row, after)) {
      measured.perplexity = std::stod(row[1]);
      measured.kl = std::stod(row[2]);
    }
    return measured;
  }

  // The mean error of all down_proj, as printed.
  static double DownError(const Measured& measured) {
    const std::regex row(R"(\| down_proj +\| +5 \| +[0-9.]+ \| +\| +[0-9.]+ % \| +([0-9.]+) \|)");
    std::smatch found;
    EXPECT_TRUE(std::regex_search(measured.text, found, row)) << measured.text;
    return found.empty() ? 0 : std::stod(found[1]);
  }

  Error Refusal(const QuantizeArgs& args) const {
    testing::internal::CaptureStdout();
    const Result<void> done = Quantize(args, {[] { return false; }});
    EXPECT_EQ(testing::internal::GetCapturedStdout(), "");
    EXPECT_FALSE(done.ok());
    EXPECT_TRUE(std::filesystem::is_empty(directory_.path())) << "nothing is left behind";
    return done.ok() ? Error{} : done.error();
  }

  TemporaryDirectory directory_;
};

// What weights are worth is not a question for sanitizers, under which it takes minutes.
#if defined(INNERQ_SANITIZED)
#define SKIP_WHERE_SLOW() GTEST_SKIP() << "slow under a sanitizer"
#else
#define SKIP_WHERE_SLOW()
#endif

TEST_F(QuantizeTest, EightBitsAreNearlyLosslessAndFewerAreWorse) {
  SKIP_WHERE_SLOW();
  QuantizeArgs args = Args("uniform8");
  args.evaluation = {Recall()};
  args.weights.scheme = "uniform";
  args.weights.bits = 8;
  const Measured eight = Run(args);
  EXPECT_LT(eight.kl, 0.01) << eight.text;
  EXPECT_GT(eight.kl, 0) << eight.text;
  EXPECT_NEAR(eight.perplexity / eight.perplexity_before, 1, 0.02) << eight.text;
  EXPECT_NE(eight.text.find("error: squared, relative, of the weights"), std::string::npos);
  EXPECT_NE(eight.text.find("3932160 weights in 8.250 bits each"), std::string::npos) << eight.text;
  EXPECT_NE(eight.text.find("the texts of --evaluate, in"), std::string::npos);
  args.output = directory_.path() / "uniform4";
  args.weights.bits = 4;
  const Measured four = Run(args);
  args.output = directory_.path() / "uniform3";
  args.weights.bits = 3;
  const Measured three = Run(args);
  EXPECT_LT(eight.kl, four.kl);
  EXPECT_LT(four.kl, three.kl);
  EXPECT_LT(DownError(four), DownError(three));
  args.weights.scheme = "pow2";
  args.evaluation = {};
  args.output = directory_.path() / "pow2-3";
  const Measured pow2_three = Run(args);
  args.output = directory_.path() / "pow2-4";
  args.weights.bits = 4;
  const Measured pow2_four = Run(args);
  EXPECT_LT(DownError(pow2_four), DownError(pow2_three));
  EXPECT_EQ(pow2_four.perplexity, 0) << "there was nothing to measure on";
}

TEST_F(QuantizeTest, CalibratesAndMeasuresOnWhatIsLeft) {
  SKIP_WHERE_SLOW();
  QuantizeArgs args = Args("pow2-4");
  args.calibration = {Recall()};
  const Measured four = Run(args);
  EXPECT_NE(four.text.find("calibrated on " + std::to_string(kTokens) + " tokens in 1 windows"),
            std::string::npos)
      << four.text;
  EXPECT_NE(four.text.find("error: squared, relative, of the outputs"), std::string::npos);
  EXPECT_NE(four.text.find("calibration texts that calibration did not use"), std::string::npos);
  EXPECT_NE(four.text.find("3932160 weights in 4.250 bits each"), std::string::npos) << four.text;
  EXPECT_EQ(four.text.find("| lm_head "), std::string::npos) << four.text;
  EXPECT_GT(four.kl, 0) << four.text;
  EXPECT_LT(four.kl, 0.1) << four.text;

  args.output = directory_.path() / "with_head";
  args.weights.head_bits = 8;
  const Measured with_head = Run(args);
  EXPECT_NE(with_head.text.find("| lm_head   |        1 |"), std::string::npos) << with_head.text;
  EXPECT_NEAR(with_head.kl, four.kl, 0.1 * four.kl) << with_head.text;
  EXPECT_NE(with_head.kl, four.kl) << with_head.text;
}

TEST_F(QuantizeTest, StaticActivationsAreClippedAndWeightsPruned) {
  QuantizeArgs args = Args();
  const std::filesystem::path text = directory_.path() / "text.txt";
  WriteAll(text, "The code of the red lantern is 4821.");
  args.calibration = {text};
  args.weights.activation_bits = 3;
  args.prune = 0.4;
  std::filesystem::create_directory(args.output);  // empty: may be there
  const Measured measured = Run(args);
  EXPECT_NE(measured.text.find("the texts that calibration used"), std::string::npos);
  const std::regex row(R"(\| q_proj +\| +5 \| +[0-9.]+ \| +([0-9.]+) \| +([0-9.]+) % \|)");
  std::smatch found;
  ASSERT_TRUE(std::regex_search(measured.text, found, row)) << measured.text;
  EXPECT_GT(std::stod(found[1]), 1);
  EXPECT_NEAR(std::stod(found[2]), 40, 3);
  EXPECT_NE(ReadAll(args.output / "model.safetensors").find("input_clip"), std::string::npos);
}

TEST_F(QuantizeTest, SingleMatricesArePrunedAndToldOf) {
  QuantizeArgs args = Args();
  args.prune = 0.25;
  args.prune_matrices = {"*.mlp.*=0.9", "*.mlp.down_proj=0.5", "*.mlp.gate_proj=0.25",
                         "*.mlp.up_proj=0.25"};
  const Measured measured = Run(args);
  const auto has = [&](const char* row) {
    EXPECT_NE(measured.text.find(row), std::string::npos) << row << "\n" << measured.text;
  };
  has("| *.mlp.*                      |        0 |  90.0 % |         |\n");
  has("| *.mlp.down_proj              |        5 |  50.0 % |  50.0 % |\n");
  has("| *.mlp.gate_proj              |        5 |  25.0 % |  25.0 % |\n");
  has("| all others                   |       20 |  25.0 % |  25.0 % |\n");
  EXPECT_EQ(Run(Args("all")).text.find("| pruned "), std::string::npos);
}

TEST_F(QuantizeTest, RefusesWhatItCannotDo) {
  const auto refuses = [this](const std::function<void(QuantizeArgs&)>& change,
                              const std::string& part) {
    QuantizeArgs args = Args();
    change(args);
    const std::string message = Refusal(args).message;
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  refuses([](auto& args) { args.weights.scheme = "round"; },
          "--scheme: expected pow2, apot or uniform");
  refuses([](auto& args) { args.weights = {.scheme = "pow2", .bits = 8}; },
          "--bits: expected 2, 3 or 4 for --scheme pow2, found 8");
  refuses([](auto& args) { args.weights = {.scheme = "", .bits = 5}; },
          "--bits: expected 2, 3 or 4 for pow2; 4 for apot; 2, 3, 4 or 8 for uniform, found 5");
  refuses([](auto& args) { args.weights.group_size = 48; }, "--group-size: expected 32, 64 or 128");
  refuses([](auto& args) { args.weights.activation_bits = 5; },
          "--activation-bits: expected 3, 4, 8 or 16");
  refuses([](auto& args) { args.weights.activation_bits = 3; },
          "--activation-bits 3 takes --calibration: its clip is learned from inputs");
  refuses([](auto& args) { args.weights.head_bits = 5; },
          "--head-bits: expected 2, 3, 4 or 8, found 5");
  refuses([](auto& args) { args.scale = "pow3"; }, "--scale: expected free or pow2, found pow3");
  refuses([](auto& args) { args.prune = 0.96; }, "--prune: expected a share in [0, 0.95]");
  refuses([](auto& args) { args.prune = std::nan(""); }, "--prune: ");
  for (const char* rule : {"", "=", "=0.5", "*", "*=", "*=half", "*=0.5x", "*= 0.5", "*=0.5="}) {
    refuses(
        [rule](auto& args) {
          args.prune_matrices = {"*=0.1", rule};
        },
        std::string("--prune-matrix: expected PATTERN=R, R a number, found ") + rule);
  }
  for (const char* rule : {"*=0.96", "*=-0.1", "*=nan", "*=inf"}) {
    refuses([rule](auto& args) { args.prune_matrices = {rule}; },
            std::string("--prune-matrix ") + rule + ": expected a share in [0, 0.95], found ");
  }
  refuses(
      [](auto& args) {
        args.prune_matrices = {"*.q_proj=0.5", "model.layers.5.*=0.5"};
      },
      "--prune-matrix: no matrix matches model.layers.5.*; the first is "
      "model.layers.0.self_attn.q_proj, the last model.layers.4.mlp.down_proj");
  refuses([](auto& args) { args.calibration_tokens = 1; }, "--calibration-tokens: ");
  refuses([](auto& args) { args.evaluation_tokens = 0; }, "--evaluate-tokens: ");
  refuses([](auto& args) { args.calibration = {"/nonexistent.txt"}; }, "/nonexistent.txt");
  refuses([](auto& args) { args.model = "/nonexistent"; }, "/nonexistent");
  refuses([](auto& args) { args.output = "/nonexistent/a"; }, "cannot create /nonexistent/a");
  refuses([](auto& args) { args.output = ""; }, "OUT_DIR: expected a directory");
  refuses([](auto& args) { args.output = Demo(); },
          "is there already; expected an empty directory");
  refuses(
      [](auto& args) {
        args.model = TinyLlamaDirectory();
        args.weights.group_size = 128;
      },
      "--group-size 128: model.layers.0.self_attn.q_proj: 64 inputs are no multiple of 128");
}

TEST_F(QuantizeTest, AnInterruptedRunLeavesNothing) {
  QuantizeArgs args = Args();
  for (const bool calibrates : {false, true}) {
    if (calibrates) args.calibration = {Recall()};
    int asked = 0;
    // Late enough that the file has been begun.
    const Result<void> stopped = Quantize(args, {[&asked] { return ++asked > 8; }});
    ASSERT_FALSE(stopped.ok());
    EXPECT_EQ(stopped.error().code, ErrorCode::kCancelled);
    EXPECT_TRUE(std::filesystem::is_empty(directory_.path()));
  }
}

TEST(OutputDirectory, AppearsAtTheEndAndReplacesOnlyAnEmptyOne) {
  const TemporaryDirectory directory;
  const std::filesystem::path path = directory.path() / "out";
  {
    const auto dropped = OutputDirectory::Create(path, "OUT");
    ASSERT_TRUE(dropped.ok());
    WriteAll(dropped->path() / "a", "a");
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
  auto first = OutputDirectory::Create(path / "", "OUT");
  auto second = OutputDirectory::Create(path, "OUT");
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_NE(first->path(), second->path());
  WriteAll(first->path() / "a", "a");
  EXPECT_FALSE(std::filesystem::exists(path));
  ASSERT_TRUE(first->Commit().ok());
  EXPECT_EQ(ReadAll(path / "a"), "a");
  const Result<void> taken = second->Commit();
  ASSERT_FALSE(taken.ok());
  EXPECT_EQ(taken.error().message, "cannot create " + path.string() + ": Directory not empty");
  const auto third = OutputDirectory::Create(path, "OUT");
  ASSERT_FALSE(third.ok());
  EXPECT_EQ(third.error().code, ErrorCode::kInvalidArgument);
  EXPECT_FALSE(OutputDirectory::Create(path / "a", "OUT").ok()) << "a file";
}

TEST(OutputDirectory, MayBeRelative) {
  const TemporaryDirectory directory;
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(directory.path());
  for (const std::string& name : {std::string("plain"), std::string("slash/"), std::string("./dot"),
                                  "../" + directory.path().filename().string() + "/parent"}) {
    auto output = OutputDirectory::Create(name, "OUT");
    ASSERT_TRUE(output.ok()) << name;
    const Result<void> committed = output->Commit();
    EXPECT_TRUE(committed.ok()) << name << ": "
                                << (committed.ok() ? "" : committed.error().message);
    EXPECT_TRUE(std::filesystem::is_directory(name)) << name;
  }
  std::filesystem::current_path(before);
}

TEST(OutputDirectory, IsOnTheDiskBeforeItHasItsName) {
  const TemporaryDirectory directory;
  const std::filesystem::path path = directory.path() / "out";
  auto output = OutputDirectory::Create(path, "OUT");
  ASSERT_TRUE(output.ok());
  const std::filesystem::path partial = output->path();
  WriteAll(partial / "a", "a");
  WriteAll(partial / "b", "b");
  synced_files.clear();
  ASSERT_TRUE(output->Commit().ok());
  ASSERT_EQ(synced_files.size(), 4u);
  EXPECT_EQ(std::set(synced_files.begin(), synced_files.begin() + 2),
            (std::set{partial / "a", partial / "b"}));
  EXPECT_EQ(synced_files[2], partial) << "the files' names";
  EXPECT_EQ(synced_files[3], directory.path()) << "its own";
}

TEST(OutputDirectory, IsRemovedByAnyThreadAndNotCommittedThen) {
  const TemporaryDirectory directory;
  auto output = OutputDirectory::Create(directory.path() / "out", "OUT");
  ASSERT_TRUE(output.ok());
  WriteAll(output->path() / "a", "a");
  std::jthread([&output] { EXPECT_TRUE(output->Remove()); }).join();
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
  EXPECT_FALSE(output->Commit().ok());
  auto committed = OutputDirectory::Create(directory.path() / "out", "OUT");
  ASSERT_TRUE(committed.ok());
  ASSERT_TRUE(committed->Commit().ok());
  EXPECT_TRUE(committed->Remove()) << "there is nothing to remove";
  EXPECT_TRUE(std::filesystem::exists(directory.path() / "out"));
}

}  // namespace
}  // namespace innerq
