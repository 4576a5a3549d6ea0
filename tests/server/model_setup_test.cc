#include "server/model_setup.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/models/test_files.h"

namespace innerq {
namespace {

using nlohmann::json;

TEST(ModelSetup, AStopTokenThatTheModelDoesNotHaveIsRefusedByItsRole) {
  const std::filesystem::path demo = std::filesystem::path(INNERQ_SOURCE_DIR) / "models" / "demo";
  const TemporaryDirectory directory;
  std::filesystem::copy(demo, directory.path());
  const auto options =
      ParseOptions(json{{"model", {{"path", directory.path().string()}}}}.dump(), {});
  ASSERT_TRUE(options.ok()) << options.error().message;
  const auto refusal = [&]() -> std::string {
    const auto parts = LoadParts(*options);
    if (parts.ok()) return "none";
    EXPECT_EQ(parts.error().code, ErrorCode::kInvalidArgument);
    EXPECT_EQ(parts.error().param, "model.path");
    return parts.error().message;
  };
  json config = json::parse(ReadAll(demo / "tokenizer_config.json"));
  json& added = config["added_tokens_decoder"];
  added["1024"] = added["4"];
  added["1024"]["content"] = "<end>";
  WriteAll(directory.path() / "tokenizer_config.json", config.dump());
  EXPECT_EQ(refusal(), "none") << "a token that nothing needs";

  config["eos_token"] = "<end>";
  WriteAll(directory.path() / "tokenizer_config.json", config.dump());
  EXPECT_EQ(refusal(),
            "model.path: the tokenizer's eos_token: expected a token id below vocab_size 1024 "
            "(config.json), found 1024");

  config["eos_token"] = "</s>";
  WriteAll(directory.path() / "tokenizer_config.json", config.dump());
  WriteAll(directory.path() / "chat_template.jinja",
           "{% for m in messages %}{{ m.role + ':' + m.content + '<end>' }}{% endfor %}");
  EXPECT_EQ(refusal(), "model.path: the end of a turn in the chat template " +
                           (directory.path() / "chat_template.jinja").string() +
                           ": expected a token id below vocab_size 1024 (config.json), found 1024");
}

}  // namespace
}  // namespace innerq
