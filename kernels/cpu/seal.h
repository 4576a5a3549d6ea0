// Encoding of full open pages into sealed ones, and key norms, in CodeOrder::kPanel16.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/cpu_isa.h"

namespace innerq {

constexpr int kSealLanes = 16;  // groups that are encoded together

// EncodeGroups<kSealLanes>, compiled for one instruction set.
using EncodeFunction = void (*)(const QuantSpec& spec, const float* x, const float* weights, int n,
                                uint8_t* codes, GroupParams* params);
EncodeFunction EncodeFunctionFor(CpuIsa isa);

// Scratch memory of one thread for SealHead.
struct SealScratch {
  float x[128 * 256];        // [T][D], one side of the page
  float weights[256];        // [D], of errors in keys
  uint8_t codes[128 * 256];  // in page order, one a byte
};

// Seals one head of one page. False if it held a non-finite value.
bool SealHead(EncodeFunction encode, const PagedKvView& kv, const SealItem& item, int64_t head,
              SealScratch& scratch);

// Computes one head's key norm (KeyNormArgs).
void ComputeHeadKeyNorm(const PagedKvView& kv, const KeyNormItem& item, int64_t head);

}  // namespace innerq
