// Metrics: what the server counts and measures, as Prometheus text.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/engine.h"

namespace innerq {

// What a cache is made of; fixed after start.
struct CacheInfo {
  int64_t capacity_tokens = 0;    // of one sequence that grows alone
  double sealed_bits = 0;         // per element of sealed pages, scales included
  double effective_bits = 0;      // over a sequence of the longest context, F16 windows included
  int64_t open_page_bytes = 0;    // F16 page, all layers
  int64_t sealed_page_bytes = 0;  // quantized page, all layers
  struct Layer {
    std::optional<QuantMode> key;  // nullopt: F16
    std::optional<QuantMode> value;
  };
  std::vector<Layer> layers{};
};

// Measurements of the API's side of requests. Thread-safe.
class Metrics {
 public:
  Metrics(std::string model_name, const CacheInfo& cache);

  void ObserveFirstToken(double seconds);                  // since the request arrived
  void ObserveInterToken(double seconds, int64_t tokens);  // each of so many tokens took that long
  // `reason`: stop, length, abort (the client left) or error.
  void CountFinished(const std::string& reason, double seconds);

  // Everything, with the engine's counters, in Prometheus' text format 0.0.4. Names follow vLLM's
  // where the meaning is the same.
  std::string Render(const EngineStats& stats) const;

 private:
  const std::string labels_;
  const CacheInfo cache_;
  mutable std::mutex mutex_;
  Histogram first_token_, inter_token_, end_to_end_;
  std::map<std::string, int64_t> finished_;
};

}  // namespace innerq
