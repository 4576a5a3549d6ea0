// Instructions that C++ has no words for: products of tensor cores, copies that run beside the
// code, halves in pairs. PTX ISA 7.0, sm_80 and later; bulk copies: PTX ISA 8.0, sm_90.
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

// The same with sums that start from `from`: c = from + a * b.
__device__ inline void Multiply(const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                const float (&from)[4], float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(from[0]), "f"(from[1]),
        "f"(from[2]), "f"(from[3]));
}

// MultiplyAdd with BF16 in.
__device__ inline void MultiplyAddBf16(const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                       float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c [16][8] += a [16][32] * b [32][8] of bytes, those of a unsigned, those of b signed:
// mma.m16n8k32. Lane 4g + i:
//   a  rows g, g + 8, g, g + 8; columns 4i to 4i + 3 of the first two, 16 more of the others
//   b  column g; rows 4i to 4i + 3, then 16 more
//   c  as of MultiplyAdd
// Sums do not depend on how columns of a and rows of b are permuted.
__device__ inline void MultiplyAddBytes(const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                        int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Byte i of the result is that byte of (low, high), eight of them, which the lower three bits of
// nibble i of `selectors` name. Where the nibble's highest bit is set it is 0xff or 0: that byte's
// highest bit, eight times. The upper 16 bits of `selectors` do not matter.
__device__ inline uint32_t SelectBytes(uint32_t low, uint32_t high, uint32_t selectors) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selectors));
  return bytes;
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

// 2^x to two units in the last place; results below 2^-126 are 0.
__device__ inline float FastExp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
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

// Copies of whole blocks of memory, and the barriers in shared memory that tell when they are
// there. A barrier has phases: one ends when the thread that began it has arrived and what it
// promised has been copied; their parities alternate from 0 on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define INNERQ_BULK_COPIES 1

__device__ inline uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
// By one thread, before all that use it meet.
__device__ inline void InitBarrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(SharedAddress(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and promises `bytes` of copies.
__device__ inline void ArriveAndExpect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}
// Begins to copy `bytes` from global to shared memory; all are multiples of 16.
__device__ inline void CopyBulk(void* shared, const void* global, uint32_t bytes,
                                uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(shared)),
      "l"(global), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}
// Waits for the end of the phase of parity `parity`; the thread then sees what was copied.
__device__ inline void WaitForPhase(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}
#else
#define INNERQ_BULK_COPIES 0
#endif

}  // namespace innerq::cuda
