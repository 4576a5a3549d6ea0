#include "server/self_check.h"

#include <gtest/gtest.h>

namespace innerq {
namespace {

using Lines = std::vector<std::string>;

// What the check of the demo model says, warnings with a "!" before them.
Lines Check(std::vector<std::string> overrides, const std::string& preset = "innerq_base") {
  overrides.push_back("backend.threads=1");
  const auto options =
      LoadOptions(std::string(INNERQ_SOURCE_DIR) + "/configs/" + preset + ".json", overrides);
  EXPECT_TRUE(options.ok()) << (options.ok() ? "" : options.error().message);
  const auto parts = LoadParts(*options);
  EXPECT_TRUE(parts.ok()) << (parts.ok() ? "" : parts.error().message);
  Lines lines;
  for (const SelfCheckLine& line : SelfCheck(*options, *parts)) {
    lines.push_back((line.warning ? "!" : "") + line.text);
  }
  return lines;
}

bool Contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(SelfCheck, FindsTheDemoModelsCacheGoodInTheTimeItHas) {
  const Lines lines = Check({});
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_TRUE(lines[0].starts_with("self-check: KL divergence from an F16 cache 0.0")) << lines[0];
  EXPECT_TRUE(Contains(lines[0], "on 128 tokens")) << lines[0];
}

#if !defined(INNERQ_SANITIZED)  // minutes, for what the others show it
TEST(SelfCheck, WarnsOfThePresetsThatDamageTheDemoModel) {
  for (const char* good : {"int8", "int4", "innerq_base", "innerq_small", "innerq_hybrid"}) {
    const Lines lines = Check({"self_check.seconds=600"}, good);
    ASSERT_EQ(lines.size(), 1u) << good;
    EXPECT_FALSE(lines[0].starts_with("!")) << good << ": " << lines[0];
  }
  for (const char* bad : {"kivi", "kivi_sink"}) {
    const Lines lines = Check({"self_check.seconds=600"}, bad);
    ASSERT_EQ(lines.size(), 2u) << bad;
    EXPECT_TRUE(lines[0].starts_with("!self-check: KL")) << bad << ": " << lines[0];
  }
}
#endif

TEST(SelfCheck, WarnsAndNamesTheLayers) {
  const Lines lines =
      Check({"self_check.warn_kl=0", "self_check.seconds=600", "kv_cache.layers.0.range=0-2",
             "kv_cache.layers.0.key.bits=16", "kv_cache.layers.0.key.normalize=off",
             "kv_cache.layers.0.value.bits=16", "kv_cache.key.bits=2"});
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_TRUE(Contains(lines[0], "!self-check: KL")) << lines[0];
  EXPECT_TRUE(Contains(lines[0], "the chosen bits damage this model")) << lines[0];
  EXPECT_TRUE(Contains(lines[1], "!self-check: quantized alone, keys ")) << lines[1];
  EXPECT_TRUE(Contains(lines[1], "layer 0 0, layer 1 0, layer 2 0;")) << "the last: " << lines[1];
}

TEST(SelfCheck, SaysWhatItLeftOut) {
  EXPECT_EQ(Check({"self_check.enabled=false"}), Lines());
  EXPECT_EQ(Check({"kv_cache.key.bits=16", "kv_cache.value.bits=16"}), Lines());
  EXPECT_EQ(Check({"scheduler.max_context=100"}),
            Lines{"self-check: skipped, the context ends before pages are quantized"});
  EXPECT_EQ(Check({"self_check.seconds=0"}),
            Lines{"self-check: not done, the time was over before the text was read; see "
                  "self_check.seconds"});
}

}  // namespace
}  // namespace innerq
