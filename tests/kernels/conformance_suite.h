// One suite for all backends: every operation of every backend and variant against the reference.
//
// Each check makes hard inputs from a fixed seed, runs reference and candidate, and returns what is
// wrong, or an empty string. Outputs are filled with NaN and guarded by known bytes on both sides.
// Checks are plain functions so that the suite itself can be shown to fail on a broken backend.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/backend.h"

namespace innerq::conformance {

struct ConformanceCheck {
  std::string_view name;
  std::string (*run)(Backend& candidate);
};

// All operations but those on the cache; with CacheChecks() at least one entry for every
// operation of Backend.
const std::vector<ConformanceCheck>& ConformanceChecks();

struct CacheCase {
  std::string name;
  KvCacheSpec spec;
  int64_t group = 1;  // query heads per key/value head
};

std::vector<CacheCase> CacheCases();

// The operations on the cache, each checked case by case. A layer without key norms has none to
// compute, one without codes nothing to seal.
struct CacheCheck {
  std::string_view name;
  std::string (*run)(Backend& candidate, const CacheCase& c);
  bool (*applies)(const KvCacheSpec::Layer& layer);
};

const std::vector<CacheCheck>& CacheChecks();

// Rows of a product, bit for bit, whatever the number of rows.
std::string CheckMatMulRows(Backend& candidate);

// Rows of attention, bit for bit: alone, in chunks, and beside another sequence. The rows cross a
// border of segments (see kernels/cuda/attention_plan.h) and of strips.
std::string CheckAttentionRows(Backend& candidate, const CacheCase& c);

}  // namespace innerq::conformance
