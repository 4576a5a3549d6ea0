#include "server/eval_data.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>

#include "server/eval_setup.h"
#include "server/output_file.h"
#include "server/recall_text.h"
#include "tests/models/test_files.h"

namespace innerq {
namespace {

class EvalData : public testing::Test {
 protected:
  std::filesystem::path Write(const std::string& name, std::string_view text) {
    WriteAll(directory_.path() / name, text);
    return directory_.path() / name;
  }
  std::string TextError(const std::filesystem::path& file) {
    const auto texts = ReadTexts({file}, 0);
    EXPECT_FALSE(texts.ok());
    return texts.ok() ? "" : texts.error().message;
  }
  std::string ProblemError(const std::filesystem::path& file) {
    const auto problems = ReadProblems(file, 0);
    EXPECT_FALSE(problems.ok());
    return problems.ok() ? "" : problems.error().message;
  }

  const TemporaryDirectory directory_;
};

std::shared_ptr<const Tokenizer> DemoTokenizer() {
  return Tokenizer::Load(std::filesystem::path(INNERQ_SOURCE_DIR) / "models/demo").value();
}

TEST_F(EvalData, DocumentsAreFilesOrLines) {
  const auto plain = Write("a.txt", "One\ndocument.\n");
  const auto lines = Write("b.jsonl",
                           "{\"text\": \"first\"}\n\n{\"prompt\": \"p\", \"answer\": \"a\"}\r\n"
                           "{\"question\": \"q?\", \"answer\": \"#### 1\", \"more\": 1}");
  EXPECT_EQ(ReadTexts({plain, lines}, 0).value(),
            (std::vector<std::string>{"One\ndocument.\n", "first", "p a",
                                      "Question: q?\nAnswer: #### 1"}));
  EXPECT_EQ(ReadTexts({lines, plain, lines}, 1).value(),
            (std::vector<std::string>{"first", "One\ndocument.\n", "first"}));
}

TEST_F(EvalData, SaysWhichLineIsWrong) {
  const std::string at = directory_.path().string();
  EXPECT_EQ(TextError(at + "/none.txt"),
            "cannot read " + at + "/none.txt: No such file or directory");
  EXPECT_EQ(TextError(at), "cannot read " + at + ": Is a directory");
  EXPECT_EQ(TextError(Write("e.txt", " \n")), at + "/e.txt: the text is empty");
  EXPECT_EQ(TextError(Write("e.jsonl", "\n\n")), at + "/e.jsonl: there is no line in it");
  const std::string good = "{\"text\": \"x\"}\n\n";
  EXPECT_EQ(TextError(Write("e.jsonl", good + "{\"text\": \"\"}")),
            at + "/e.jsonl:3: text is empty");
  EXPECT_EQ(TextError(Write("e.jsonl", good + "[]")), at + "/e.jsonl:3: expected a JSON object");
  EXPECT_EQ(TextError(Write("e.jsonl", good + "{\"text\": 1}")).substr(0, at.size() + 20),
            at + "/e.jsonl:3: expected");
  EXPECT_EQ(TextError(Write("e.jsonl", good + "{\"text\"")).substr(0, at.size() + 12),
            at + "/e.jsonl:3: ");
  EXPECT_NE(TextError(Write("e.jsonl", "{\"text\": \"a\", \"text\": \"b\"}")).find("twice"),
            std::string::npos);
  EXPECT_NE(TextError(Write("e.jsonl", DeepJson())).find("levels"), std::string::npos);
  EXPECT_EQ(ProblemError(Write("e.jsonl", "{\"question\": \"q\", \"answer\": \"42\"}")),
            at + "/e.jsonl:1: the answer has no number after ####");
  EXPECT_EQ(ProblemError(Write("e.jsonl", good)),
            at + "/e.jsonl:1: expected \"question\" and \"answer\", both strings");
}

TEST(FinalNumber, IsWhatStandsAfterTheMark) {
  EXPECT_EQ(FinalNumber("2 + 3 = 5\n#### 5"), "5");
  EXPECT_EQ(FinalNumber("#### 1,234\n"), "1234");
  EXPECT_EQ(FinalNumber("####-7"), "-7");
  EXPECT_EQ(FinalNumber("#### $12.50 in all"), "12.5");
  EXPECT_EQ(FinalNumber("#### 5. Question: #### 6"), "5") << "the first; a full stop is none of it";
  EXPECT_EQ(FinalNumber("The answer is 5"), "");
  EXPECT_EQ(FinalNumber("#### five"), "");
  EXPECT_EQ(FinalNumber("#### -$"), "");
}

TEST(FinalNumber, IsOneTextForEqualNumbers) {
  for (const char* text : {"#### 18", "#### 18.00", "####\t18", "#### +18", "#### **18**",
                           "#### 018", "#### $18.", "#### 18, I think"}) {
    EXPECT_EQ(FinalNumber(text), "18") << text;
  }
  for (const char* text : {"#### -1,200.50", "#### -$1200.5", "#### $-1200.5000"}) {
    EXPECT_EQ(FinalNumber(text), "-1200.5") << text;
  }
  EXPECT_EQ(FinalNumber("#### -0.0"), "0");
  EXPECT_EQ(FinalNumber("#### .5"), "0.5");
}

TEST(FinalNumber, IsNotTakenFromAHeading) {
  const std::string answer = "#### Step one\nTom has 9 + 9 = 18.\n#### 18";
  EXPECT_EQ(FinalNumber(answer), "18");
  EXPECT_FALSE(HasFinalLine("#### Step one\nTom has"));
  EXPECT_FALSE(HasFinalLine(answer)) << "more digits may follow";
  EXPECT_TRUE(HasFinalLine(answer + "\n"));
}

TEST(CutIntoWindows, ScoresEveryTokenOfATextOnceAndBeginsWindowsWithBos) {
  const auto tokenizer = DemoTokenizer();
  const std::string text = "The farmer walked near the river in the morning and sang all day.";
  const std::vector<int32_t> ids = tokenizer->Encode(text, {});
  ASSERT_EQ(ids.front(), *tokenizer->bos_id());
  for (const int64_t context : {2, 3, 7, 1000}) {
    std::vector<int32_t> scored;
    for (const EvalText& window : CutIntoWindows(*tokenizer, {text}, context, 0)) {
      EXPECT_LE(static_cast<int64_t>(window.tokens.size()), context);
      EXPECT_EQ(window.tokens.front(), ids.front());
      scored.insert(scored.end(), window.tokens.begin() + window.first_scored, window.tokens.end());
    }
    EXPECT_EQ(scored, std::vector<int32_t>(ids.begin() + 1, ids.end())) << context;
  }
  EXPECT_EQ(CutIntoWindows(*tokenizer, {text, text}, 7, 1).size(), 2u) << "one of each";
  EXPECT_EQ(CutIntoWindows(*tokenizer, {text}, 7, 100).size(),
            CutIntoWindows(*tokenizer, {text}, 7, 0).size());
}

TEST(CacheChoice, IsAFileWithReplacedKeys) {
  const std::string file = std::string(INNERQ_SOURCE_DIR) + "/configs/innerq_base.json";
  EXPECT_EQ(ParseCacheChoice(file)->name, "innerq_base");
  EXPECT_EQ(ParseCacheChoice(file)->options.key.bits, 3);
  const auto choice =
      ParseCacheChoice(file + ",key.bits=2,layers.0.range=0-1,layers.0.value.bits=8").value();
  EXPECT_EQ(choice.name, "innerq_base,key.bits=2,layers.0.range=0-1,layers.0.value.bits=8");
  EXPECT_EQ(choice.options.key.bits, 2);
  ASSERT_EQ(choice.options.layers.size(), 1u);
  EXPECT_EQ(choice.options.layers[0].last_layer, 1);
  const auto json = ParseCacheChoice(file + ",layers=[{\"range\": \"0\", \"key\": {\"bits\": 8}}]");
  ASSERT_TRUE(json.ok()) << json.error().message;
  EXPECT_EQ(json->options.layers.size(), 1u) << "commas in values stay";
  EXPECT_EQ(ParseCacheChoice("none.json,key.bits=2").error().message,
            "--cache: cannot read configuration file none.json: No such file or directory");
  EXPECT_EQ(ParseCacheChoice(file + ",bits=2").error().param, "kv_cache.bits");
}

TEST(CacheChoice, IsCalledInUtf8) {
  const TemporaryDirectory directory;
  WriteAll(directory.path() / "a\xff.json", R"({"kv_cache": {"key": {"bits": 2}}})");
  const auto choice = ParseCacheChoice((directory.path() / "a\xff.json").string() + ",key.bits=4");
  ASSERT_TRUE(choice.ok()) << choice.error().message;
  EXPECT_EQ(choice->name, "a\xef\xbf\xbd,key.bits=4");
}

TEST(Needle, IsAsLongAsItIsToldAndStandsWhereItIsTold) {
  const auto tokenizer = DemoTokenizer();
  const EncodeNeedle encode = [&](const std::string& text, const std::string& question) {
    return tokenizer->Encode(text + "\n\n" + ProblemPrompt(question), {});
  };
  for (const int64_t length : {64, 300, 2000}) {
    for (const int64_t records : {0, 20, 100}) {
      for (const int64_t depth : {0, 50, 100}) {
        const NeedleSpec spec{
            .length = length, .depth_percent = depth, .record_percent = records, .seed = 7};
        const Needle needle = MakeNeedle(spec, *tokenizer, encode).value();
        const int64_t tokens = std::ssize(needle.prompt);
        EXPECT_EQ(needle.prompt, encode(needle.text, needle.question).value());
        EXPECT_LE(tokens, length);
        EXPECT_LE(needle.least_length, tokens);
        EXPECT_GT(tokens, length - 40) << "a sentence less at most";
        const size_t at = needle.text.find(" is " + needle.code + ".");
        ASSERT_NE(at, std::string::npos);
        const double share = static_cast<double>(at) / static_cast<double>(needle.text.size());
        if (length < 2000) continue;
        EXPECT_NEAR(share, static_cast<double>(depth) / 100, 0.05);
      }
    }
  }
  const NeedleSpec spec{.length = 200, .depth_percent = 50, .record_percent = 50, .seed = 1};
  EXPECT_EQ(MakeNeedle(spec, *tokenizer, encode)->text, MakeNeedle(spec, *tokenizer, encode)->text);

  NeedleSpec least = spec;
  least.length = MakeNeedle(spec, *tokenizer, encode)->least_length;
  EXPECT_EQ(std::ssize(MakeNeedle(least, *tokenizer, encode)->prompt), least.length);
  least.length = 1;
  const Needle shortest = MakeNeedle(least, *tokenizer, encode).value();
  EXPECT_EQ(std::ssize(shortest.prompt), shortest.least_length) << "never without its code";
  const auto fails = [](const std::string&, const std::string&) -> Result<std::vector<int32_t>> {
    return InvalidArgument("no template");
  };
  EXPECT_EQ(MakeNeedle(spec, *tokenizer, fails).error().message, "no template");
}

TEST(Needle, IsFoundAmongTheTokensOfItsPrompt) {
  const auto tokenizer = DemoTokenizer();
  const EncodeNeedle encode = [&](const std::string& text, const std::string& question) {
    return tokenizer->Encode(text + "\n\n" + ProblemPrompt(question), {});
  };
  for (const int64_t depth : {0, 50, 100}) {
    const Needle needle =
        MakeNeedle({.length = 500, .depth_percent = depth, .record_percent = 50, .seed = 3},
                   *tokenizer, encode)
            .value();
    const std::span<const int32_t> tokens(needle.prompt.begin() + needle.begin,
                                          needle.prompt.begin() + needle.end);
    const std::string text = tokenizer->Decode({tokens.begin(), tokens.end()}, false);
    EXPECT_NE(text.find(needle.code), std::string::npos) << depth << ": " << text;
    EXPECT_LT(text.size(), 60u) << "one sentence: " << text;
  }
}

// SentencePiece as Llama 2 has it puts a space before every text that it encodes.
TEST(Needle, IsAsLongAsItIsToldWhereSpacesArePutBeforeTexts) {
  const auto directory = SharedPath("assets/models/stories260K-hf");
  SKIP_WITHOUT(directory);
  const auto tokenizer = Tokenizer::Load(directory).value();
  const EncodeNeedle encode = [&](const std::string& text, const std::string& question) {
    return tokenizer->Encode(text + "\n\n" + ProblemPrompt(question), {});
  };
  const NeedleSpec spec{.length = 2000, .depth_percent = 50, .record_percent = 20, .seed = 1};
  const Needle needle = MakeNeedle(spec, *tokenizer, encode).value();
  EXPECT_LE(std::ssize(needle.prompt), 2000);
  EXPECT_GT(std::ssize(needle.prompt), 2000 - 60) << "a sentence less at most";
}

TEST(OutputFile, KeepsTheOldContentUntilItIsWritten) {
  const TemporaryDirectory directory;
  const std::filesystem::path path = directory.path() / "file";
  { const auto file = OutputFile::Open(path).value(); }
  EXPECT_FALSE(std::filesystem::exists(path)) << "made, but not written";
  WriteAll(path, "a long old content");
  { const auto file = OutputFile::Open(path).value(); }
  EXPECT_EQ(ReadAll(path), "a long old content");
  OutputFile file = OutputFile::Open(path).value();
  EXPECT_EQ(ReadAll(path), "a long old content");
  ASSERT_TRUE(file.Write("new").ok());
  EXPECT_EQ(ReadAll(path), "new");
}

// Files of at most so many bytes while it lives: writing ends early, as on a full disk.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() { setrlimit(RLIMIT_FSIZE, &before_); }

 private:
  rlimit before_{};
};

TEST(OutputFile, LeavesNoPartOfADocument) {
  const TemporaryDirectory directory;
  const std::filesystem::path path = directory.path() / "file";
  {
    OutputFile file = OutputFile::Open(path).value();
    const FileSizeLimit limit(4);
    EXPECT_FALSE(file.Write("too long").ok());
  }
  EXPECT_FALSE(std::filesystem::exists(path));
  WriteAll(path, "old");
  {
    OutputFile file = OutputFile::Open(path).value();
    const FileSizeLimit limit(4);
    EXPECT_FALSE(file.Write("too long").ok());
  }
  EXPECT_EQ(ReadAll(path), "");
}

}  // namespace
}  // namespace innerq
