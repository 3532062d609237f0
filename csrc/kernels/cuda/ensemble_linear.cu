// One block computes one tile of the outputs. Copies of the operands run kStages - 1 tiles ahead of the arithmetic.
// Results go through shared memory, so that one thread adds the bias, applies ReLU, rounds and makes the mask's byte
// for eight neighbours.
#include "../ensemble_linear.h"
#include "loop.cuh"
#include "mma.cuh"

namespace ensadv {
namespace {

constexpr int kStages = 4;

// LinearArgs, and what the launcher derives from them.
struct Problem : LinearArgs {
  int a_width, b_width;  // bytes that may be copied at once from a row; 0: less than 4
  bool aligned;          // may eight outputs be written as 16-byte words?
};

// Where a tile of the operands begins. The tiles of the next member follow, where members are summed.
struct Cursor {
  int64_t member;
  int inner = 0;

  template <class Tile>
  __device__ __forceinline__ void advance(const Problem& p) {
    inner += Tile::kK;
    if (inner >= p.inner) {
      inner = 0;
      ++member;
    }
  }
};

template <class T>
__device__ __forceinline__ void add_bias(const In& bias, int64_t at, int count, float (&v)[kMaskBits]) {
  if (!bias.data) return;
  float more[kMaskBits];
  load_pack<T, kMaskBits>(bias.data, at, count, false, more);
#pragma unroll
  for (int j = 0; j < kMaskBits; ++j) v[j] += more[j];
}

template <class Tile>
struct Block {
  using T = typename Tile::T;
  using A = typename Tile::A;
  using B = typename Tile::B;
  static constexpr int kStageChunks = A::kCount + B::kCount, kElements = A::kElements;
  static constexpr int kMine = A::kCount / Tile::kThreads;  // chunks of a that a thread copies and masks
  static constexpr int kResultBytes = Tile::kM * Tile::kPitch * 4;
  static constexpr int kStageBytes = kStages * kStageChunks * 16;
  static constexpr int kSharedBytes = kStageBytes > kResultBytes ? kStageBytes : kResultBytes;

  const Problem& p;
  uint4* shared;
  int first_row, first_col;

  __device__ __forceinline__ uint4* a(int stage) const { return shared + stage * kStageChunks; }
  __device__ __forceinline__ uint4* b(int stage) const { return a(stage) + A::kCount; }

  __device__ __forceinline__ void copy(int stage, const Cursor& at) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int c = int(threadIdx.x) + i * Tile::kThreads, row = c / A::kChunks, chunk = c % A::kChunks;
      const int64_t from = ((p.shared ? 0 : at.member) * p.batch + first_row + row) * p.inner;
      copy_chunk<T>(a(stage) + A::at(row, chunk), p.a.data, from, first_row + row < p.batch,
                    at.inner + chunk * kElements, p.inner, p.a_width);
    }
#pragma unroll
    for (int i = 0; i < B::kCount / Tile::kThreads; ++i) {
      const int c = int(threadIdx.x) + i * Tile::kThreads, row = c / B::kChunks, chunk = c % B::kChunks;
      const int rows = Tile::kInnerFirst ? p.inner : p.cols, cols = Tile::kInnerFirst ? p.cols : p.inner;
      const int r = (Tile::kInnerFirst ? at.inner : first_col) + row;
      copy_chunk<T>(b(stage) + B::at(row, chunk), p.b.data, (at.member * rows + r) * cols, r < rows,
                    (Tile::kInnerFirst ? first_col : at.inner) + chunk * kElements, cols, p.b_width);
    }
  }

  // The mask's bits for this thread's chunks of a.
  __device__ __forceinline__ void fetch_bits(uint32_t (&bits)[kMine], const Cursor& at) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int c = int(threadIdx.x) + i * Tile::kThreads, row = first_row + c / A::kChunks;
      const int col = at.inner + c % A::kChunks * kElements;
      const int64_t byte = (at.member * p.batch + row) * mask_bytes(p.inner) + col / kMaskBits;
      bits[i] = row < p.batch && col < p.inner ? uint32_t(p.keep[byte]) >> col % kMaskBits : 0u;
    }
  }
  // Sets the elements to 0 whose bit is 0. Each thread masks the chunks that it copied, which it sees before other
  // threads do.
  __device__ __forceinline__ void drop(const uint32_t (&bits)[kMine], int stage) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int c = int(threadIdx.x) + i * Tile::kThreads;
      uint4* chunk = a(stage) + A::at(c / A::kChunks, c % A::kChunks);
      uint32_t words[4];
      memcpy(words, chunk, 16);
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] &= kept_bits<T>(bits[i], w);
      memcpy(chunk, words, 16);
    }
  }

  __device__ __forceinline__ void finish(int64_t member) const {
    constexpr int kPerRow = Tile::kN / kMaskBits;
    const float* results = reinterpret_cast<const float*>(shared);
    for (int u = int(threadIdx.x); u < Tile::kM * kPerRow; u += Tile::kThreads) {
      const int row = u / kPerRow, col = u % kPerRow * kMaskBits, c = first_col + col;
      if (first_row + row >= p.batch || c >= p.cols) continue;
      float v[kMaskBits];
      memcpy(v, reinterpret_cast<const float4*>(results + row * Tile::kPitch + col), sizeof(v));
      const int count = p.cols - c < kMaskBits ? p.cols - c : kMaskBits;
      add_bias<T>(p.bias, member * p.cols + c, count, v);
      const int64_t out_row = member * p.batch + first_row + row;
      T outputs[kMaskBits];
      uint32_t bits = 0;
#pragma unroll
      for (int j = 0; j < kMaskBits; ++j)
        bits |= (finish_output(v[j], p.mask != nullptr, outputs + j) & uint32_t(j < count)) << j;
      store_pack<T, kMaskBits>(p.out.data, out_row * p.cols + c, count, p.aligned && count == kMaskBits, outputs);
      if (p.mask) p.mask[out_row * mask_bytes(p.cols) + c / kMaskBits] = uint8_t(bits);
    }
  }
};

// Copies the operands' tiles to shared memory, each to the next of kStages stages.
template <class Tile>
struct Copies {
  const Block<Tile>& block;
  int64_t tiles;
  Cursor at;
  int64_t copied = 0;

  __device__ __forceinline__ void start_next() {
    if (copied < tiles) {
      block.copy(int(copied % kStages), at);
      at.template advance<Tile>(block.p);
    }
    ++copied;
    end_of_stage();  // even without a copy, because stages are awaited by their number
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) linear_kernel(const Problem p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  extern __shared__ uint4 shared[];
  const Block<Tile> block{p, shared, int(blockIdx.x) * Tile::kM, int(blockIdx.y) * Tile::kN};
  const int warp = int(threadIdx.x) / kWarpLanes, lane = int(threadIdx.x) % kWarpLanes;
  const int64_t member = blockIdx.z;
  const int64_t tiles = int64_t((p.inner + Tile::kK - 1) / Tile::kK) * (p.reduce ? p.members : 1);
  Copies<Tile> copies{block, tiles, {member}};
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) copies.start_next();
  Cursor next{member};
  uint32_t bits[Block<Tile>::kMine];
  if (p.keep) block.fetch_bits(bits, next);
  Sums<Tile> sums;
#pragma unroll 1
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int stage = int(tile % kStages);
    await_stages<kStages - 2>();
    if (p.keep) block.drop(bits, stage);
    __syncthreads();  // all threads' copies have arrived, and the stage to be overwritten next has been used
    copies.start_next();
    if (p.keep && tile + 1 < tiles) {
      next.template advance<Tile>(p);
      block.fetch_bits(bits, next);
    }
    sums.add(block.a(stage), block.b(stage), warp, lane);
  }
  await_stages<0>();
  __syncthreads();
  sums.store(reinterpret_cast<float*>(shared), warp, lane);
  __syncthreads();
  block.finish(member);
#else
  __trap();
#endif
}

// The widest copies, in bytes, for which every row is aligned; 0: less than 4.
int width_of(const In& in, int64_t cols) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(in.data) | uint64_t(cols * size_of(in.dtype));
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 0;
}

template <class Tile>
int launch_linear(const Problem& p, void* stream) {
  constexpr int bytes = Block<Tile>::kSharedBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(linear_kernel<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return int(error);
  const dim3 grid((p.batch + Tile::kM - 1) / Tile::kM, (p.cols + Tile::kN - 1) / Tile::kN,
                  p.reduce ? 1 : unsigned(p.members));
  linear_kernel<Tile><<<grid, Tile::kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(p);
  return int(cudaGetLastError());
}

template <class T, bool kInnerFirst>
int launch_tile(const Problem& p, void* stream) {
  using Small = SmallTile<T, kInnerFirst>;
  if constexpr (sizeof(T) == 4) {
    return launch_linear<Small>(p, stream);
  } else {
    using Large = LargeTile<T, kInnerFirst>;
    int device = 0, sms = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return int(error);
    // Large tiles read less memory per product, but are faster only if there are enough to occupy the device.
    const int64_t large = int64_t((p.batch + Large::kM - 1) / Large::kM) * ((p.cols + Large::kN - 1) / Large::kN) *
                          (p.reduce ? 1 : p.members);
    return large >= sms ? launch_linear<Large>(p, stream) : launch_linear<Small>(p, stream);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) act_kernel(const LinearActArgs args, int64_t units, bool aligned) {
  const int64_t per_row = mask_bytes(args.cols), stride = int64_t(gridDim.x) * kThreads;
  for (int64_t u = int64_t(blockIdx.x) * kThreads + threadIdx.x; u < units; u += stride) {
    const int64_t row = u / per_row;
    const int col = int(u % per_row) * kMaskBits;
    const int count = args.cols - col < kMaskBits ? args.cols - col : kMaskBits;
    const bool whole = aligned && count == kMaskBits;
    const int64_t at = row * args.cols + col;
    float v[kMaskBits];
    load_pack<T, kMaskBits>(args.keep ? args.a.data : args.out.data, at, count, whole, v);
    const uint32_t kept = args.keep ? args.keep[u] : 0xffu;
#pragma unroll
    for (int j = 0; j < kMaskBits; ++j) v[j] = kept >> j & 1u ? v[j] : 0.0f;
    add_bias<T>(args.bias, row / args.batch * args.cols + col, count, v);
    T outputs[kMaskBits];
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kMaskBits; ++j)
      bits |= (finish_output(v[j], args.mask != nullptr, outputs + j) & uint32_t(j < count)) << j;
    store_pack<T, kMaskBits>(args.out.data, at, count, whole, outputs);
    if (args.mask) args.mask[u] = uint8_t(bits);
  }
}

template <class Run>
int with_linear_dtype(Dtype dtype, Run run) {
  if (dtype == Dtype::f32) return run(float());
  if (dtype == Dtype::f16) return run(half_t());
  if (dtype == Dtype::bf16) return run(bfloat_t());
  return int(cudaErrorInvalidValue);
}

}  // namespace

int ensemble_linear_cuda(const LinearArgs& args, void* stream) {
  const int64_t out_row = args.cols * size_of(args.out.dtype);
  const Problem p{args, width_of(args.a, args.inner), width_of(args.b, args.inner_first ? args.cols : args.inner),
                  is_aligned(args.out.data) && out_row % 16 == 0};
  return with_linear_dtype(args.out.dtype, [&](auto t) {
    using T = decltype(t);
    return args.inner_first ? launch_tile<T, true>(p, stream) : launch_tile<T, false>(p, stream);
  });
}

int ensemble_linear_act_cuda(const LinearActArgs& args, void* stream) {
  const int64_t units = args.rows * mask_bytes(args.cols);
  const bool aligned = is_aligned(args.out.data) && is_aligned(args.keep ? args.a.data : nullptr) &&
                       args.cols * size_of(args.out.dtype) % 16 == 0;
  return with_linear_dtype(args.out.dtype, [&](auto t) {
    return launch<1>(act_kernel<decltype(t)>, units, stream, args, units, aligned);
  });
}

}  // namespace ensadv
