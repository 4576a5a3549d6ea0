// Tensor-core products of mma.h: every lane holds and computes the whole of each 16 x 16 fragment,
// so what one lane does is what the warp does. Sums are rounded after every product; the hardware
// rounds otherwise, within the same bounds.
#pragma once

#include <cuda_bf16.h>

#include "kernels/float16.h"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  static constexpr int num_elements = 256;
  float x[num_elements];
};

template <typename Fragment>
void fill_fragment(Fragment& fragment, float value) {
  for (float& element : fragment.x) element = value;
}
// Row i of the fragment is what lies `stride` apart: a row of a row-major A, a column of a
// column-major B.
template <typename Fragment>
void load_matrix_sync(Fragment& to, const __nv_bfloat16* from, unsigned stride) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) to.x[i * 16 + j] = innerq::BF16ToF32(from[i * stride + j].bits);
  }
}
template <typename Sums, typename A, typename B>
void mma_sync(Sums& out, const A& a, const B& b, const Sums& sums) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      float sum = sums.x[i * 16 + j];
      for (int k = 0; k < 16; ++k) sum += a.x[i * 16 + k] * b.x[j * 16 + k];
      out.x[i * 16 + j] = sum;
    }
  }
}
template <typename Sums>
void store_matrix_sync(float* to, const Sums& from, unsigned stride, layout_t) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) to[i * stride + j] = from.x[i * 16 + j];
  }
}

}  // namespace nvcuda::wmma
