#include "kernels/cpu/cpu_isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace innerq {
namespace {

#if defined(__x86_64__)

// What __builtin_cpu_supports of Clang 14 has no names for: bits of CPUID, Intel SDM volume 2A.
bool HasF16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 29 & 1) != 0;
}

bool HasAmxTilesBf16Int8() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBits = 1u << 24 | 1u << 22 | 1u << 25;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kBits) == kBits;
}

// Highway compiles its AVX2 and AVX3 code with all of these, so all must be there.
bool HasAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16c() &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("aes");
}

bool HasAvx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

bool HasAvx512Vnni() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512bf16");
}

bool HasAmx() {
#if defined(__linux__)
  if (!HasAmxTilesBf16Int8()) return false;
  // Linux, Documentation/arch/x86/xstate.rst: tile data must be asked for, once per process.
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

std::vector<CpuIsa> DetectCpuIsas() {
  __builtin_cpu_init();
  std::vector<CpuIsa> best_last = {CpuIsa::kScalar};
  using Test = bool (*)();
  constexpr Test kTests[] = {HasAvx2, HasAvx512, HasAvx512Vnni, HasAmx};
  for (Test test : kTests) {  // each includes what stands before it
    if (!test()) break;
    best_last.push_back(static_cast<CpuIsa>(best_last.size()));
  }
  return {best_last.rbegin(), best_last.rend()};
}

#else

std::vector<CpuIsa> DetectCpuIsas() { return {CpuIsa::kScalar}; }

#endif

}  // namespace

const std::vector<CpuIsa>& SupportedCpuIsas() {
  static const std::vector<CpuIsa> isas = DetectCpuIsas();
  return isas;
}

}  // namespace innerq
