#include "server/self_check.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <string_view>

namespace innerq {
namespace {

// Plain English with things that come back, so that old tokens matter. Written for this purpose.
constexpr std::string_view kText =
    "The old harbor master kept a list of every ship that came to the island. On Monday the "
    "Swallow brought twelve barrels of oil, nine bags of rice and a box of letters from the "
    "mainland. On Tuesday the Albatross came with a cargo of timber, and her captain, a quiet "
    "woman called Ines, asked for the box of letters. The harbor master looked at his list. \"The "
    "Swallow brought it on Monday,\" he said, \"together with twelve barrels of oil and nine bags "
    "of rice. The box is in the small shed behind the church, and the teacher has the key.\" Ines "
    "walked past the market and the mill to the school, where the teacher was reading a story to "
    "the children. She waited until the story was over. Then she asked for the key to the small "
    "shed behind the church. \"I gave it to the baker this morning,\" the teacher said, \"because "
    "he wanted to count the bags of rice. There should be nine of them.\" So Ines went to the "
    "baker. He had counted only eight bags of rice, and he was not happy about it. \"The list of "
    "the harbor master says nine,\" he said, \"and the Swallow has never lost a bag before.\" "
    "Together they opened the small shed, and there, on top of the box of letters, stood the "
    "ninth bag of rice. The baker laughed, Ines took her box of letters, and in the evening the "
    "Albatross left the island for the mainland. The harbor master wrote it all down in his list, "
    "below the twelve barrels of oil: nine bags of rice, one box of letters, and one key that the "
    "teacher must get back.";

// Tokens that are checked: 128 beyond the windows of the default cache.
constexpr int64_t kMeasuredTokens = 128;

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Tokens, from the start, of which the last kMeasuredTokens are predicted from quantized pages.
// Repeats the text where windows are long.
std::vector<int32_t> Tokens(const ModelParts& parts) {
  const KvLayout& layout = parts.runner->layout();
  const int64_t windows = (layout.sink_pages() + layout.recent_pages() + 1) * layout.page_tokens();
  const auto length = static_cast<size_t>(
      std::min(windows + kMeasuredTokens + 1, parts.runner->engine_options().max_context));
  std::vector<int32_t> tokens = parts.tokenizer->Encode(kText, {});
  const std::vector<int32_t> again =
      parts.tokenizer->Encode("\n\n" + std::string(kText), {.add_bos = false});
  while (tokens.size() < length && !again.empty()) {
    tokens.insert(tokens.end(), again.begin(), again.end());
  }
  tokens.resize(std::min(tokens.size(), length));
  return tokens;
}

std::string Name(const LayerDamage& layers) {
  if (layers.first_layer == layers.last_layer) return fmt::format("layer {}", layers.first_layer);
  return fmt::format("layers {}-{}", layers.first_layer, layers.last_layer);
}

// The layers of a report, the most damaged ones first.
std::string Worst(std::vector<LayerDamage> layers) {
  constexpr size_t kMaxNamed = 8;
  std::stable_sort(layers.begin(), layers.end(),
                   [](const auto& a, const auto& b) { return a.kl_mean > b.kl_mean; });
  std::string text;
  for (size_t i = 0; i < std::min(layers.size(), kMaxNamed); ++i) {
    text += fmt::format("{}{} {:.3g}", i > 0 ? ", " : "", Name(layers[i]), layers[i].kl_mean);
  }
  if (layers.size() > kMaxNamed) text += ", others less";
  return text;
}

std::vector<SelfCheckLine> Describe(const SelfCheckReport& report, const SelfCheckOptions& options,
                                    double seconds) {
  const std::string found = fmt::format(
      "self-check: KL divergence from an F16 cache {:.3g} nats on {} tokens of a built-in text "
      "(99th percentile {:.3g}), the same most likely token for {:.1f} % of them",
      report.all.kl_mean, report.all.tokens, report.all.kl_p99, 100 * report.all.top1_agreement);
  if (!report.too_different) return {{false, fmt::format("{}; {:.1f} s", found, seconds)}};
  std::vector<SelfCheckLine> lines;
  lines.push_back({true, fmt::format("{}: the chosen bits damage this model (self_check.warn_kl is "
                                     "{:.3g}); measure it with innerq eval",
                                     found, options.warn_kl)});
  if (report.layers.empty()) {
    lines.push_back(
        {true, "self-check: no time was left to find the layers; see self_check.seconds"});
    return lines;
  }
  lines.push_back({true, fmt::format("self-check: quantized alone, keys {:.3g}, values {:.3g}; {}; "
                                     "kv_cache.layers can give layers more bits",
                                     report.keys, report.values, Worst(report.layers))});
  if (report.layers.front().first_layer != report.layers.front().last_layer) {
    lines.push_back({true,
                     "self-check: there was no time to tell all layers apart; see "
                     "self_check.seconds"});
  }
  return lines;
}

}  // namespace

std::vector<SelfCheckLine> SelfCheck(const Options& options, const ModelParts& parts) {
  if (!options.self_check.enabled || !parts.runner->layout().quantized()) return {};
  const SelfCheckArgs args{.kv_cache = options.runner.kv_cache,
                           .tokens = Tokens(parts),
                           .max_kl = options.self_check.warn_kl,
                           .seconds = options.self_check.seconds,
                           .now = Now};
  const auto last = static_cast<int64_t>(args.tokens.size()) - 1;
  if (last < 1 || parts.runner->layout().SealedPages(last - 1, 1).size() == 0) {
    return {{false, "self-check: skipped, the context ends before pages are quantized"}};
  }
  const double begin = Now();
  const auto report = CheckCache(*parts.runner, parts.config, args);
  if (!report && report.error().code == ErrorCode::kCancelled) {
    return {{false,
             "self-check: not done, the time was over before the text was read; see "
             "self_check.seconds"}};
  }
  if (!report) return {{true, "self-check: not done, " + report.error().message}};
  return Describe(*report, options.self_check, Now() - begin);
}

void CheckLoadedModel(const Options& options, const ModelParts& parts) {
  for (const SelfCheckLine& line : SelfCheck(options, parts)) {
    if (line.warning) {
      spdlog::warn("{}", line.text);
    } else {
      spdlog::info("{}", line.text);
    }
  }
}

}  // namespace innerq
