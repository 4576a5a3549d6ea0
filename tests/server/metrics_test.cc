#include "server/metrics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <sstream>
#include <thread>

namespace innerq {
namespace {

using Labels = std::map<std::string, std::string>;

struct Sample {
  std::string name;
  Labels labels;
  double value = 0;
};
struct Family {
  std::string type;
  std::vector<Sample> samples;
};

bool IsName(const std::string& text, const std::string& also) {
  return !text.empty() && std::isdigit(static_cast<unsigned char>(text[0])) == 0 &&
         std::all_of(text.begin(), text.end(), [&](char c) {
           return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' ||
                  also.find(c) != std::string::npos;
         });
}

// Reads `name{label="value",...} number`; every deviation from the format is a failure.
Sample ReadSample(const std::string& line) {
  Sample sample;
  size_t at = line.find_first_of("{ ");
  sample.name = line.substr(0, at);
  EXPECT_TRUE(IsName(sample.name, ":")) << line;
  if (at != std::string::npos && line[at] == '{') {
    do {
      const size_t equals = line.find('=', ++at);
      const std::string label = line.substr(at, equals - at);
      EXPECT_TRUE(IsName(label, "")) << line;
      at = equals + 1;
      EXPECT_EQ(line.at(at), '"') << line;
      std::string value;
      for (++at; line.at(at) != '"'; ++at) {
        if (line[at] == '\\') {
          ++at;
          EXPECT_NE(std::string("\\\"n").find(line.at(at)), std::string::npos) << line;
          value += line[at] == 'n' ? '\n' : line[at];
        } else {
          value += line[at];
        }
      }
      EXPECT_TRUE(sample.labels.emplace(label, value).second) << line;
      ++at;
    } while (line.at(at) == ',');
    EXPECT_EQ(line.at(at), '}') << line;
    ++at;
  }
  EXPECT_EQ(line.at(at), ' ') << line;
  const std::string number = line.substr(at + 1);
  size_t used = 0;
  sample.value = std::stod(number, &used);
  EXPECT_EQ(used, number.size()) << line;
  EXPECT_TRUE(std::isfinite(sample.value)) << line;
  return sample;
}

// Parses text in Prometheus' format 0.0.4, strictly: HELP, TYPE and then the samples of each
// family, once, and no sample twice.
std::map<std::string, Family> Parse(const std::string& text) {
  EXPECT_TRUE(text.ends_with("\n"));
  std::map<std::string, Family> families;
  std::set<std::pair<std::string, Labels>> seen;
  std::string family, line;
  bool typed = true;
  for (std::istringstream lines(text); std::getline(lines, line);) {
    std::istringstream words(line);
    std::string hash, keyword, name, rest;
    if (line.starts_with("#")) {
      words >> hash >> keyword >> name >> rest;
      EXPECT_EQ(keyword, typed ? "HELP" : "TYPE") << line;
      EXPECT_FALSE(rest.empty()) << line;
      if (typed) {
        EXPECT_TRUE(families.emplace(name, Family()).second) << line;
        family = name;
      } else {
        EXPECT_EQ(name, family) << line;
        families[family].type = rest;
      }
      typed = !typed;
      continue;
    }
    EXPECT_TRUE(typed) << line;
    Sample sample = ReadSample(line);
    EXPECT_TRUE(seen.emplace(sample.name, sample.labels).second) << line;
    families[family].samples.push_back(std::move(sample));
  }
  return families;
}

double Bound(const Sample& sample) {
  const std::string& le = sample.labels.at("le");
  return le == "+Inf" ? std::numeric_limits<double>::infinity() : std::stod(le);
}

// Buckets ascend and accumulate, the last is +Inf and equals the count.
void ExpectHistogram(const std::string& name, const Family& family) {
  const auto& samples = family.samples;
  ASSERT_GE(samples.size(), 3u) << name;
  const size_t buckets = samples.size() - 2;
  for (size_t i = 0; i < buckets; ++i) {
    EXPECT_EQ(samples[i].name, name + "_bucket");
    if (i == 0) continue;
    EXPECT_GT(Bound(samples[i]), Bound(samples[i - 1])) << name;
    EXPECT_GE(samples[i].value, samples[i - 1].value) << name;
  }
  EXPECT_EQ(samples[buckets - 1].labels.at("le"), "+Inf");
  EXPECT_EQ(samples[buckets].name, name + "_sum");
  EXPECT_EQ(samples[buckets + 1].name, name + "_count");
  EXPECT_EQ(samples[buckets + 1].value, samples[buckets - 1].value);
}

std::map<std::string, Family> ParseValid(const std::string& text) {
  auto families = Parse(text);
  for (const auto& [name, family] : families) {
    if (family.type == "histogram") {
      ExpectHistogram(name, family);
      continue;
    }
    EXPECT_TRUE(family.type == "counter" || family.type == "gauge") << name;
    EXPECT_EQ(family.type == "counter", name.ends_with("_total")) << name;
    for (const Sample& sample : family.samples) EXPECT_EQ(sample.name, name);
  }
  return families;
}

// The value of the only sample with this label.
double Value(const Family& family, const std::string& label, const std::string& value) {
  double found = std::nan("");
  for (const Sample& sample : family.samples) {
    const auto at = sample.labels.find(label);
    if (at == sample.labels.end() || at->second != value) continue;
    EXPECT_TRUE(std::isnan(found));
    found = sample.value;
  }
  return found;
}

TEST(Metrics, AreValidPrometheusTextWithVllmsNames) {
  Metrics metrics("a\"b\\c\nd", CacheInfo{});
  metrics.ObserveFirstToken(0.02);
  metrics.ObserveInterToken(0.003, 7);
  metrics.ObserveInterToken(1e9, 1);
  metrics.CountFinished("stop", 1.25);
  EngineStats stats;
  stats.generation_tokens = 123456789012;
  stats.prompt_tokens = 17;
  stats.prompt_tokens_computed = 5;
  stats.recomputed_tokens = 29;
  stats.queue_seconds.Observe(0.1);
  stats.step_tokens.Observe(8, 3);
  const auto families = ParseValid(metrics.Render(stats));
  for (const auto& [name, family] : families) {
    for (const Sample& sample : family.samples) {
      EXPECT_EQ(sample.labels.at("model_name"), "a\"b\\c\nd") << name;
    }
  }
  EXPECT_EQ(families.at("vllm:prompt_tokens_total").samples.at(0).value, 17);
  EXPECT_EQ(families.at("innerq:prompt_tokens_computed_total").samples.at(0).value, 5);
  EXPECT_EQ(families.at("innerq:recomputed_tokens_total").samples.at(0).value, 29);
  EXPECT_EQ(families.at("innerq:recomputed_tokens_total").type, "counter");
  for (const char* name : {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}) {
    EXPECT_EQ(families.at("vllm:" + std::string(name)).type, "gauge");
  }
  for (const char* name : {"num_preemptions_total", "prompt_tokens_total",
                           "prefix_cache_queries_total", "prefix_cache_hits_total"}) {
    EXPECT_EQ(families.at("vllm:" + std::string(name)).type, "counter");
  }
  for (const char* name :
       {"time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
        "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
        "iteration_tokens_total", "request_prompt_tokens", "request_generation_tokens"}) {
    EXPECT_EQ(families.at("vllm:" + std::string(name)).type, "histogram");
  }
  EXPECT_EQ(families.at("vllm:generation_tokens_total").samples.at(0).value, 123456789012.0);
  EXPECT_EQ(Value(families.at("vllm:inter_token_latency_seconds"), "le", "0.0025"), 0);
  EXPECT_EQ(Value(families.at("vllm:inter_token_latency_seconds"), "le", "0.005"), 7);
  EXPECT_EQ(Value(families.at("vllm:inter_token_latency_seconds"), "le", "+Inf"), 8);
  EXPECT_EQ(Value(families.at("vllm:iteration_tokens_total"), "le", "8"), 3);
  EXPECT_EQ(Value(families.at("vllm:request_success_total"), "finished_reason", "stop"), 1);
}

TEST(Metrics, TellWhatTheCacheHolds) {
  const CacheInfo cache{.capacity_tokens = 5000,
                        .sealed_bits = 3.5,
                        .effective_bits = 4.25,
                        .open_page_bytes = 100,
                        .sealed_page_bytes = 30,
                        .layers = {{QuantMode::kSymmetric, QuantMode::kHybrid},
                                   {QuantMode::kAsymmetric, std::nullopt}}};
  const Metrics metrics("m", cache);
  EngineStats stats;
  stats.open_pages = 8;
  stats.open_pages_used = 2;
  stats.sealed_pages = 50;
  stats.sealed_pages_used = 10;
  stats.sealed_pages_cached = 7;
  stats.prefix_cache_queries = 500;
  stats.prefix_cache_hits = 320;
  const auto share = [&] {
    return ParseValid(metrics.Render(stats)).at("innerq:kv_asymmetric_groups_ratio").samples;
  };
  EXPECT_EQ(share().size(), 2u) << "nothing has been measured of the hybrid side";
  stats.sealed_groups = {{.key = {64, 0}, .value = {64, 16}}, {.key = {64, 64}, .value = {}}};
  const std::vector<Sample> shares = share();
  ASSERT_EQ(shares.size(), 3u);
  const auto expect = [&](size_t i, const char* layer, const char* side, double value) {
    EXPECT_EQ(shares[i].labels.at("layer"), layer);
    EXPECT_EQ(shares[i].labels.at("side"), side);
    EXPECT_EQ(shares[i].value, value);
  };
  expect(0, "0", "key", 0);
  expect(1, "0", "value", 0.25);
  expect(2, "1", "key", 1);

  const auto families = ParseValid(metrics.Render(stats));
  EXPECT_EQ(families.at("innerq:kv_capacity_tokens").samples.at(0).value, 5000);
  EXPECT_EQ(Value(families.at("innerq:kv_bits_per_element"), "windows", "excluded"), 3.5);
  EXPECT_EQ(Value(families.at("innerq:kv_bits_per_element"), "windows", "included"), 4.25);
  EXPECT_EQ(Value(families.at("innerq:kv_pages"), "kind", "sealed"), 50);
  EXPECT_EQ(Value(families.at("innerq:kv_pages_used"), "kind", "sealed"), 10);
  EXPECT_EQ(Value(families.at("innerq:kv_pages_cached"), "kind", "sealed"), 7);
  EXPECT_EQ(Value(families.at("innerq:kv_pages_cached"), "kind", "open"), 0);
  EXPECT_EQ(families.at("vllm:prefix_cache_queries_total").samples.at(0).value, 500);
  EXPECT_EQ(families.at("vllm:prefix_cache_hits_total").samples.at(0).value, 320);
  EXPECT_EQ(Value(families.at("innerq:kv_bytes"), "kind", "open"), 800);
  EXPECT_EQ(Value(families.at("innerq:kv_bytes_used"), "kind", "sealed"), 300);
  EXPECT_EQ(families.at("vllm:kv_cache_usage_perc").samples.at(0).value, 0.25);
}

TEST(Metrics, MayBeReadWhileRequestsEnd) {
  Metrics metrics("m", CacheInfo{});
  {
    std::jthread writer([&] {
      for (int i = 0; i < 200; ++i) {
        metrics.ObserveFirstToken(0.1);
        metrics.CountFinished(i % 2 == 0 ? "stop" : "abort", 0.5);
      }
    });
    for (int i = 0; i < 20; ++i) ParseValid(metrics.Render({}));
  }
  const auto families = ParseValid(metrics.Render({}));
  EXPECT_EQ(Value(families.at("vllm:request_success_total"), "finished_reason", "abort"), 100);
}

}  // namespace
}  // namespace innerq
