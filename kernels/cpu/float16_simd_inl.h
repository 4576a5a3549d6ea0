// What all Highway files know of F16, compiled once per instruction set.

// Not a plain include guard: the file is read anew for every instruction set.
#if defined(INNERQ_KERNELS_CPU_FLOAT16_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef INNERQ_KERNELS_CPU_FLOAT16_SIMD_INL_H_
#undef INNERQ_KERNELS_CPU_FLOAT16_SIMD_INL_H_
#else
#define INNERQ_KERNELS_CPU_FLOAT16_SIMD_INL_H_
#endif

#include "hwy/highway.h"
#include "kernels/float16.h"

HWY_BEFORE_NAMESPACE();
namespace innerq {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// A vector of F32, exact.
template <class D>
HWY_INLINE hn::Vec<D> LoadF16(D d, const uint16_t* x) {
#if HWY_TARGET == HWY_SCALAR  // Highway's scalar conversion loses infinity and NaN
  return hn::Set(d, F16ToF32(*x));
#else
  const hn::Rebind<hwy::float16_t, D> d16;
  return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(x)));
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace innerq
HWY_AFTER_NAMESPACE();

#endif
