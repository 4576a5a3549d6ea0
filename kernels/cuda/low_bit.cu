// Low-bit weights on their way into device memory, and the inputs of their products; see
// low_bit_layout.h.
#include "kernels/cuda/device_math.cuh"
#include "kernels/cuda/launch.h"

namespace innerq::cuda {
namespace {

constexpr int kPackThreads = 128;
constexpr int kRoundThreads = 512;
constexpr int kRoundWarps = kRoundThreads / kWarpSize;
constexpr int kPiece = 8;  // inputs that a thread rounds at once
constexpr int kHeld = 4;   // pieces of a thread: rows of up to 16384 inputs are read once
constexpr int kLowBits = 7;

// The device code of weight [n][k]; any beyond the matrix, where scales or inputs are zero.
__device__ uint32_t CodeOf(const PackLowBitLaunch& args, int64_t n, int64_t k) {
  const LowBitSpec& spec = args.spec;
  if (n >= args.layout.rows || k >= args.layout.cols) return 0;
  const uint8_t* codes = args.codes + n * (args.layout.cols * spec.bits / 8);
  return static_cast<uint32_t>(LowBitCodes(spec).DeviceCode(ReadLowBitCode(codes, spec.bits, k)));
}

// Puts a code to its place in a lane's words of a record; `i`: which of the four inputs.
__device__ void PlaceCode(int bits, uint32_t code, int block, int word, int half, int i,
                          uint32_t (&words)[32]) {
  const int nibble = (4 * half + i) * 4;
  switch (bits) {
    case 2:
      words[block] |= code << (nibble + 2 * word);
      return;
    case 3: {
      const int first = block / 2 * 3, at = block % 2 * 2 + word;
      if (at < 3) {
        words[first + at] |= code << nibble;
        return;
      }
      for (int bit = 0; bit < 3; ++bit) words[first + bit] |= (code >> bit & 1u) << (nibble + 3);
      return;
    }
    case 4:
      words[2 * block + word] |= code << nibble;
      return;
    default:
      words[4 * block + 2 * word + half] |= code << 8 * i;
  }
}

// Grid: records of the matrix / 4. Block: 4 warps write a record each. No shared memory.
__global__ void __launch_bounds__(kPackThreads)
    PackLowBitKernel(const __grid_constant__ PackLowBitLaunch args) {
  const LowBitLayout& layout = args.layout;
  const int64_t record =
      static_cast<int64_t>(blockIdx.x) * (kPackThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (record >= layout.Tiles() * layout.Records()) return;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first_row = record / layout.Records() * kRecordOutputs;
  const int64_t first_input = record % layout.Records() * kRecordInputs;
  std::byte* out = args.out + record * layout.RecordBytes();

  uint32_t words[32] = {};
  for (int block = 0; block < kRecordBlocks; ++block) {
    for (int at = 0; at < 16; ++at) {
      const int word = at / 8, half = at / 4 % 2, i = at % 4;
      const int64_t k = first_input + block * kBlockInputs + lane % 4 * 8 + 4 * word + i;
      const uint32_t code = CodeOf(args, first_row + lane / 4 + 8 * half, k);
      PlaceCode(layout.bits, code, block, word, half, i, words);
    }
  }
  for (int vector = 0; vector < layout.bits; ++vector) {
    reinterpret_cast<uint4*>(out)[vector * kWarpSize + lane] = {
        words[4 * vector], words[4 * vector + 1], words[4 * vector + 2], words[4 * vector + 3]};
  }
  auto* scales = reinterpret_cast<uint16_t*>(out + layout.CodeBytes());
  const int64_t groups = args.spec.group_size == 0 ? 1 : layout.cols / args.spec.group_size;
  for (int i = lane; i < layout.RecordChunks() * kRecordOutputs; i += kWarpSize) {
    const int64_t row = first_row + i % kRecordOutputs / 2 + i % 2 * 8;
    const int64_t k = first_input + i / kRecordOutputs * layout.chunk_blocks * kBlockInputs;
    const bool inside = row < layout.rows && k < layout.cols;
    const int64_t group = args.spec.group_size == 0 ? 0 : k / args.spec.group_size;
    scales[i] = inside ? args.scales[row * groups + group] : uint16_t{0};
  }
}

struct Piece {
  float x[kPiece] = {};
};

// Piece `at` of a row of K inputs, zeros beyond.
__device__ Piece ReadPiece(const float* row, int64_t cols, int64_t at) {
  Piece piece;
  if (at * kPiece >= cols) return piece;
  const auto* quads = reinterpret_cast<const float4*>(row) + at * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 quad = quads[half];
    piece.x[4 * half] = quad.x;
    piece.x[4 * half + 1] = quad.y;
    piece.x[4 * half + 2] = quad.z;
    piece.x[4 * half + 3] = quad.w;
  }
  return piece;
}

// As LargestInput.
__device__ float LargestOf(const Piece& piece, float largest) {
#pragma unroll
  for (const float x : piece.x) {
    largest = fmaxf(largest, isfinite(x) ? fabsf(x) : __uint_as_float(0x7f800000u));
  }
  return largest;
}

// Grid: rows. Block: 512 threads find the range of a row, then round it, each every 512th piece of
// eight inputs. Shared: the largest input of every warp.
__global__ void __launch_bounds__(kRoundThreads)
    RoundLowBitKernel(const __grid_constant__ RoundLowBitLaunch args) {
  __shared__ float warps[kRoundWarps];
  const LowBitInputLayout layout(args.layout, args.m);
  const int64_t row = blockIdx.x, cols = args.layout.cols;
  const float* x = args.x + row * cols;
  const int64_t num_pieces = layout.width / kPiece;  // a multiple of a warp's
  Piece held[kHeld];
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    held[i] = ReadPiece(x, cols, threadIdx.x + i * kRoundThreads);
    largest = LargestOf(held[i], largest);
  }
  for (int64_t at = threadIdx.x + kHeld * kRoundThreads; at < num_pieces; at += kRoundThreads) {
    largest = LargestOf(ReadPiece(x, cols, at), largest);
  }
  largest = WarpMax(largest);
  if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = largest;
  __syncthreads();
  for (int i = 0; i < kRoundWarps; ++i) largest = fmaxf(largest, warps[i]);

  const InputRounding rounding = InputRounding::Of(args.spec, args.clip, largest);
  const auto most = static_cast<float>(args.spec.max_activation());
  const int max_level = args.spec.max_level();
  const int chunk_pieces = args.layout.chunk_blocks * (kBlockInputs / kPiece);
  auto* starts = reinterpret_cast<int*>(args.out + layout.StartsAt());
  const auto write = [&](const Piece& piece, int64_t at) {
    int sum = 0;
    uint32_t low[2] = {}, high[2] = {};
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      const auto q = static_cast<int>(rintf(fminf(fmaxf(piece.x[i] * rounding.up, -most), most)));
      const int upper = layout.planes == 2 ? (q + (1 << (kLowBits - 1))) >> kLowBits : 0;
      sum += q;
      low[i / 4] |= static_cast<uint32_t>((q - upper * (1 << kLowBits)) & 0xff) << i % 4 * 8;
      high[i / 4] |= static_cast<uint32_t>(upper & 0xff) << i % 4 * 8;
    }
    // Pieces of a block belong to four lanes of a product: [4 t][2 blocks][8 bytes].
    const int64_t pair = at / 8, block = at / 4 % 2, t = at % 4;
    std::byte* to = args.out + row * layout.width + pair * 64 + t * 16 + block * 8;
    *reinterpret_cast<uint2*>(to) = {low[0], low[1]};
    if (layout.planes == 2) {
      *reinterpret_cast<uint2*>(to + layout.rows * layout.width) = {high[0], high[1]};
    }
    for (int mask = 1; mask < chunk_pieces; mask *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, mask);
    }
    if (at % chunk_pieces == 0) {
      starts[at / chunk_pieces * layout.StartRows() + row] = -max_level * sum;
    }
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = threadIdx.x + i * kRoundThreads;
    if (at < num_pieces) write(held[i], at);
  }
  for (int64_t at = threadIdx.x + kHeld * kRoundThreads; at < num_pieces; at += kRoundThreads) {
    write(ReadPiece(x, cols, at), at);
  }
  if (threadIdx.x == 0) {
    reinterpret_cast<float*>(args.out + layout.UnitsAt())[row] = rounding.down;
  }
}

}  // namespace

cudaError_t LaunchPackLowBit(const PackLowBitLaunch& launch, cudaStream_t stream) {
  const int64_t records = launch.layout.Tiles() * launch.layout.Records();
  const auto blocks = static_cast<unsigned>(CeilDiv(records, kPackThreads / kWarpSize));
  PackLowBitKernel<<<blocks, kPackThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t LaunchRoundLowBit(const RoundLowBitLaunch& launch, cudaStream_t stream) {
  RoundLowBitKernel<<<static_cast<unsigned>(launch.m), kRoundThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace innerq::cuda
