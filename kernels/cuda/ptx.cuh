// Instructions that C++ has no words for: products of tensor cores, copies that run beside the
// code, halves in pairs. PTX ISA 7.0, sm_80 and later.
#pragma once

#include <cstdint>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "the CUDA backend needs sm_80 or later"
#endif

namespace innerq::cuda {

// c [16][8] += a [16][16] * b [16][8] by a whole warp: mma.m16n8k16, F16 in, F32 sums. Each lane
// holds its fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16"); lane 4g + i:
//   a  rows g, g + 8, g, g + 8; columns 2i, 2i + 1 of the first two, 8 more of the others
//   b  column g; rows 2i, 2i + 1, then 8 more
//   c  rows g, g, g + 8, g + 8; columns 2i, 2i + 1, 2i, 2i + 1
__device__ inline void MultiplyAdd(const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with BF16 in.
__device__ inline void MultiplyAddBf16(const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                       float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 x 8 halves from shared memory, each as a lane of MultiplyAdd has it: lane 4g +
// i gets columns 2i and 2i + 1 of row g of matrix j as word j. `row`: for lane 8j + g, row g of
// matrix j, 16 bytes at a multiple of 16. By a whole warp.
__device__ inline void LoadMatrices(const void* row, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Two floats as halves of a word, to nearest even; the first is the lower one.
__device__ inline uint32_t PackHalves(float low, float high) {
  uint32_t halves;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high), "f"(low));
  return halves;
}

// Likewise as two BF16.
__device__ inline uint32_t PackBf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// x * y + z in both halves, rounded once.
__device__ inline uint32_t MultiplyAddHalves(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t halves;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(halves) : "r"(x), "r"(y), "r"(z));
  return halves;
}

// Begins to copy 16 bytes from global to shared memory; both addresses are multiples of 16. The
// bytes belong to the group that the next CommitCopies ends.
__device__ inline void CopyAsync(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
// The same of the first `bytes`, in [0, 16]; the others become zeros. With 0 nothing is read.
__device__ inline void CopyAsync(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(bytes)
               : "memory");
}
__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of the thread's latest groups are under way. Other threads see what
// was copied after a barrier.
template <int kPending>
__device__ inline void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace innerq::cuda
