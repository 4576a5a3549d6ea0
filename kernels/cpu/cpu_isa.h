// CpuIsa: the instruction-set variants of the CPU backend, and which of them this machine can run.
#pragma once

#include <string_view>
#include <vector>

namespace innerq {

// Best last. Each includes what stands before it.
enum class CpuIsa {
  kScalar,      // baseline x86-64 or any other machine
  kAvx2,        // AVX2, FMA, F16C
  kAvx512,      // AVX-512 F, BW, CD, DQ, VL
  kAvx512Vnni,  // and VNNI, VBMI, BF16
  kAmx,         // and AMX tiles, BF16 and INT8
};

constexpr std::string_view CpuIsaName(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kScalar:
      return "scalar";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx512Vnni:
      return "avx512_vnni";
    case CpuIsa::kAmx:
      return "amx";
  }
  return "?";
}

// What this machine can run, best first. The first call asks the kernel for the use of AMX tiles
// (one arch_prctl request per process); without that permission kAmx is absent. Thread-safe.
const std::vector<CpuIsa>& SupportedCpuIsas();

}  // namespace innerq
