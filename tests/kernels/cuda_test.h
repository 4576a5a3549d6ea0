// CudaTest: a test on the device "cuda", a GPU or an emulated one, behind a mirror; skipped with
// the reason where there is none. Parameter: whether the device is deterministic.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <utility>

#include "kernels/backend.h"
#include "tests/kernels/host_mirror.h"

namespace innerq {

class CudaTest : public ::testing::TestWithParam<bool> {
 protected:
  explicit CudaTest(const StepLimits& limits) : limits_(limits) {}

  void SetUp() override {
    Result<std::unique_ptr<Backend>> device =
        CreateBackend({.device = "cuda", .deterministic = GetParam()});
    if (!device.ok()) {
      ASSERT_EQ(device.error().code, ErrorCode::kUnavailable) << device.error().message;
      GTEST_SKIP() << device.error().message;
    }
    ASSERT_EQ((*device)->name().substr(0, 8), "cuda/sm_");
    ASSERT_EQ((*device)->deterministic(), GetParam());
    mirror_ = std::make_unique<HostMirror>(std::move(*device));
    ASSERT_TRUE(mirror_->Reserve(limits_).ok());
  }

  std::unique_ptr<HostMirror> mirror_;

 private:
  const StepLimits limits_;
};

}  // namespace innerq
