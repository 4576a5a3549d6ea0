#include "server/metrics.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

namespace innerq {
namespace {

// A label's value: backslash, quote and line feed are escaped.
std::string EscapeLabel(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    if (c == '\\' || c == '"') escaped += '\\';
    if (c == '\n') {
      escaped += "\\n";
    } else {
      escaped += c;
    }
  }
  return escaped;
}

// Writes families of samples that share the model's label.
class Writer {
 public:
  explicit Writer(const std::string& labels) : labels_(labels) {}

  void Family(std::string_view name, std::string_view type, std::string_view help) {
    text_ += fmt::format("# HELP {0} {1}\n# TYPE {0} {2}\n", name, help, type);
  }
  void Sample(std::string_view name, double value, std::string_view more_labels = "") {
    text_ += fmt::format("{}{{{}{}{}}} {}\n", name, labels_, more_labels.empty() ? "" : ",",
                         more_labels, value);
  }
  void Gauge(std::string_view name, std::string_view help, double value) {
    Family(name, "gauge", help);
    Sample(name, value);
  }
  void Counter(std::string_view name, std::string_view help, int64_t value) {
    Family(name, "counter", help);
    Sample(name, static_cast<double>(value));
  }
  void Add(const std::string& name, std::string_view help, const Histogram& histogram) {
    Family(name, "histogram", help);
    int64_t cumulative = 0;
    for (size_t i = 0; i < histogram.counts().size(); ++i) {
      cumulative += histogram.counts()[i];
      const bool bounded = i < histogram.bounds().size();
      const std::string bound = bounded ? fmt::format("{}", histogram.bounds()[i]) : "+Inf";
      Sample(name + "_bucket", static_cast<double>(cumulative), "le=\"" + bound + "\"");
    }
    Sample(name + "_sum", histogram.sum());
    Sample(name + "_count", static_cast<double>(cumulative));
  }
  std::string Take() { return std::move(text_); }

 private:
  const std::string& labels_;
  std::string text_;
};

// The share of asymmetric groups; nullopt where there are none yet, or never.
std::optional<double> AsymmetricShare(std::optional<QuantMode> mode, const GroupCount& sealed) {
  if (mode == QuantMode::kSymmetric) return 0.0;
  if (mode == QuantMode::kAsymmetric) return 1.0;
  if (!mode || sealed.groups == 0) return std::nullopt;
  return static_cast<double>(sealed.asymmetric) / static_cast<double>(sealed.groups);
}

double Share(int64_t used, int64_t all) {
  return all > 0 ? static_cast<double>(used) / static_cast<double>(all) : 0.0;
}

// Load, throughput and the phases of requests.
void RenderEngine(const EngineStats& stats, Writer* out) {
  out->Gauge("vllm:num_requests_running", "Requests in the running batch.",
             static_cast<double>(stats.running));
  out->Gauge("vllm:num_requests_waiting", "Accepted requests that wait to run.",
             static_cast<double>(stats.waiting));
  out->Gauge("vllm:kv_cache_usage_perc",
             "Share of the fuller page pool in use by requests, 0 to 1.",
             std::max(Share(stats.open_pages_used, stats.open_pages),
                      Share(stats.sealed_pages_used, stats.sealed_pages)));
  out->Counter("vllm:num_preemptions_total", "Sequences pushed out to be recomputed.",
               stats.preemptions);
  out->Counter("innerq:recomputed_tokens_total",
               "Tokens of prompts and answers computed again after preemptions.",
               stats.recomputed_tokens);
  out->Counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.",
               stats.prefix_cache_queries);
  out->Counter("vllm:prefix_cache_hits_total", "Prompt tokens found there.",
               stats.prefix_cache_hits);
  out->Counter("innerq:prefix_cache_evictions_total",
               "States that the prefix cache gave up for others' pages.",
               stats.prefix_cache_evictions);
  out->Counter("vllm:prompt_tokens_total", "Tokens of prompts, cached ones included.",
               stats.prompt_tokens);
  out->Counter("innerq:prompt_tokens_computed_total",
               "Prompt tokens computed, after preemptions again.", stats.prompt_tokens_computed);
  out->Counter("vllm:generation_tokens_total", "Tokens generated.", stats.generation_tokens);
  out->Add("vllm:iteration_tokens_total", "Tokens computed by one step.", stats.step_tokens);
  out->Add("vllm:request_queue_time_seconds", "From acceptance to the first step.",
           stats.queue_seconds);
  out->Add("vllm:request_prefill_time_seconds", "From the first step to the first token.",
           stats.prefill_seconds);
  out->Add("vllm:request_decode_time_seconds", "From the first token to the last.",
           stats.decode_seconds);
  out->Add("vllm:request_prompt_tokens", "Prompt tokens of finished requests.",
           stats.request_prompt_tokens);
  out->Add("vllm:request_generation_tokens", "Generated tokens of finished requests.",
           stats.request_generation_tokens);
  out->Counter("innerq:requests_accepted_total", "Requests taken by the engine.", stats.accepted);
  out->Counter("innerq:requests_finished_total", "Of those, ended in any way.", stats.finished);
  out->Counter("innerq:steps_total", "Steps of the model.", stats.steps);
}

// What the cache holds and how.
void RenderCache(const CacheInfo& cache, const EngineStats& stats, Writer* out) {
  out->Gauge("innerq:kv_capacity_tokens", "Tokens that one sequence growing alone could cache.",
             static_cast<double>(cache.capacity_tokens));
  out->Family("innerq:kv_bits_per_element", "gauge",
              "Bits per cached element, scales included: of sealed pages alone, and over a "
              "sequence of the longest context with its F16 windows.");
  out->Sample("innerq:kv_bits_per_element", cache.sealed_bits, "windows=\"excluded\"");
  out->Sample("innerq:kv_bits_per_element", cache.effective_bits, "windows=\"included\"");
  struct Pool {
    const char* label;
    int64_t pages, used, cached, page_bytes;
  };
  const Pool pools[] = {{"kind=\"open\"", stats.open_pages, stats.open_pages_used,
                         stats.open_pages_cached, cache.open_page_bytes},
                        {"kind=\"sealed\"", stats.sealed_pages, stats.sealed_pages_used,
                         stats.sealed_pages_cached, cache.sealed_page_bytes}};
  const auto family = [&](const char* name, const char* help, auto value) {
    out->Family(name, "gauge", help);
    for (const Pool& pool : pools) out->Sample(name, static_cast<double>(value(pool)), pool.label);
  };
  family("innerq:kv_pages", "Pages of each kind.", [](const Pool& p) { return p.pages; });
  family("innerq:kv_pages_used", "Of those, in use by requests.",
         [](const Pool& p) { return p.used; });
  family("innerq:kv_pages_cached", "Of those, kept for later prompts, free for whoever needs them.",
         [](const Pool& p) { return p.cached; });
  family("innerq:kv_bytes", "Bytes of all pages of each kind.",
         [](const Pool& p) { return p.pages * p.page_bytes; });
  family("innerq:kv_bytes_used", "Of those, in use by requests.",
         [](const Pool& p) { return p.used * p.page_bytes; });
  out->Family("innerq:kv_asymmetric_groups_ratio", "gauge",
              "Share of asymmetric groups among those of a layer; of hybrid ones as measured since "
              "the start.");
  for (size_t i = 0; i < cache.layers.size(); ++i) {
    const LayerGroups sealed =
        i < stats.sealed_groups.size() ? stats.sealed_groups[i] : LayerGroups();
    const auto sample = [&](const char* side, std::optional<double> share) {
      if (!share) return;
      out->Sample("innerq:kv_asymmetric_groups_ratio", *share,
                  fmt::format("layer=\"{}\",side=\"{}\"", i, side));
    };
    sample("key", AsymmetricShare(cache.layers[i].key, sealed.key));
    sample("value", AsymmetricShare(cache.layers[i].value, sealed.value));
  }
}

}  // namespace

Metrics::Metrics(std::string model_name, const CacheInfo& cache)
    : labels_("model_name=\"" + EscapeLabel(model_name) + "\""),
      cache_(cache),
      first_token_({0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,  0.25, 0.5,
                    0.75,  1.0,   2.5,  5.0,  7.5,  10.0, 20.0, 40.0, 80.0, 160.0}),
      inter_token_({0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
                    0.75, 1.0, 2.5, 5.0, 10.0}),
      end_to_end_({0.05, 0.1,  0.3,  0.5,  0.8,  1.0,  1.5,   2.0,   2.5,   5.0,  10.0,
                   15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0}),
      finished_({{"stop", 0}, {"length", 0}, {"abort", 0}, {"error", 0}}) {}

void Metrics::ObserveFirstToken(double seconds) {
  const std::lock_guard lock(mutex_);
  first_token_.Observe(seconds);
}

void Metrics::ObserveInterToken(double seconds, int64_t tokens) {
  const std::lock_guard lock(mutex_);
  inter_token_.Observe(seconds, tokens);
}

void Metrics::CountFinished(const std::string& reason, double seconds) {
  const std::lock_guard lock(mutex_);
  ++finished_[reason];
  end_to_end_.Observe(seconds);
}

std::string Metrics::Render(const EngineStats& stats) const {
  Writer out(labels_);
  RenderEngine(stats, &out);
  {
    const std::lock_guard lock(mutex_);
    out.Family("vllm:request_success_total", "counter", "Requests answered, by their ending.");
    for (const auto& [reason, count] : finished_) {
      out.Sample("vllm:request_success_total", static_cast<double>(count),
                 "finished_reason=\"" + reason + "\"");
    }
    out.Add("vllm:time_to_first_token_seconds", "From the request to its first token.",
            first_token_);
    out.Add("vllm:inter_token_latency_seconds", "Between tokens of one answer.", inter_token_);
    out.Add("vllm:e2e_request_latency_seconds", "From the request to the end of its answer.",
            end_to_end_);
  }
  RenderCache(cache_, stats, &out);
  return out.Take();
}

}  // namespace innerq
