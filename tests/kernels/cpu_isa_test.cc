// Which CPU variants run, and that a forced one is the one that ran.
#include "kernels/cpu/cpu_isa.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "kernels/backend.h"

namespace innerq {
namespace {

TEST(CpuIsa, SupportedVariantsAreOrderedBestFirstAndEndWithScalar) {
  const std::vector<CpuIsa>& isas = SupportedCpuIsas();
  ASSERT_FALSE(isas.empty());
  EXPECT_EQ(isas.back(), CpuIsa::kScalar);
  EXPECT_TRUE(std::is_sorted(isas.rbegin(), isas.rend()));
  EXPECT_EQ(std::adjacent_find(isas.begin(), isas.end()), isas.end());
  // Each includes what stands before it, so none is left out.
  EXPECT_EQ(isas.size(), static_cast<size_t>(isas.front()) + 1);
}

TEST(CpuIsa, NamesAreThoseOfTheVariants) {
  std::vector<std::string> names;
  for (CpuIsa isa : SupportedCpuIsas()) names.emplace_back(CpuIsaName(isa));
  EXPECT_EQ(CpuVariants(), names);
}

TEST(CpuIsa, AutoRunsTheBestVariant) {
  const auto backend = CreateBackend({.device = "cpu", .variant = "auto"});
  ASSERT_TRUE(backend.ok());
  EXPECT_EQ((*backend)->name(), "cpu/" + CpuVariants().front());
  EXPECT_TRUE((*backend)->deterministic());
}

TEST(CpuIsa, AForcedVariantIsTheOneThatRuns) {
  for (const std::string& variant : CpuVariants()) {
    const auto backend = CreateBackend({.device = "cpu", .variant = variant});
    ASSERT_TRUE(backend.ok()) << variant;
    EXPECT_EQ((*backend)->name(), "cpu/" + variant);
  }
}

TEST(CpuIsa, AnUnknownVariantIsRefusedWithTheNamesThatExist) {
  const auto backend = CreateBackend({.device = "cpu", .variant = "sse9"});
  ASSERT_FALSE(backend.ok());
  EXPECT_EQ(backend.error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(backend.error().param, "backend.variant");
  for (const std::string& variant : CpuVariants()) {
    EXPECT_NE(backend.error().message.find(variant), std::string::npos) << variant;
  }
}

TEST(CpuIsa, AKnownVariantThatThisMachineLacksIsUnavailable) {
  if (SupportedCpuIsas().front() == CpuIsa::kAmx) GTEST_SKIP() << "this machine has every variant";
  const auto backend = CreateBackend({.device = "cpu", .variant = "amx"});
  ASSERT_FALSE(backend.ok());
  EXPECT_EQ(backend.error().code, ErrorCode::kUnavailable);
}

TEST(CpuIsa, ANegativeNumberOfThreadsIsRefused) {
  const auto backend = CreateBackend({.device = "cpu", .threads = -1});
  ASSERT_FALSE(backend.ok());
  EXPECT_EQ(backend.error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(backend.error().param, "backend.threads");
}

TEST(CpuIsa, MemoryIsZeroedAlignedAndRefusedWhenThereIsNotEnough) {
  const auto backend = CreateBackend({.device = "cpu"});
  ASSERT_TRUE(backend.ok());
  for (const int64_t bytes : {1, 64, 1000, 5 << 20}) {
    const Result<Buffer> buffer = (*backend)->Allocate(bytes);
    ASSERT_TRUE(buffer.ok()) << bytes;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % 64, 0u);
    EXPECT_TRUE(std::all_of(buffer->data(), buffer->data() + bytes,
                            [](std::byte b) { return b == std::byte{0}; }));
  }
  for (const int64_t bytes : {int64_t{1} << 46, int64_t{1} << 62}) {
    const Result<Buffer> buffer = (*backend)->Allocate(bytes);
    ASSERT_FALSE(buffer.ok());
    EXPECT_EQ(buffer.error().code, ErrorCode::kResourceExhausted);
    EXPECT_NE(buffer.error().message.find(std::to_string(bytes)), std::string::npos);
  }
}

}  // namespace
}  // namespace innerq
