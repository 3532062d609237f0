// The arithmetic of the matrix product in PTX (asynchronous copies to shared memory, ldmatrix, mma), and a thread's
// sums.
#pragma once

#include "../matrix_tile.h"
#include "loop.cuh"

namespace ensadv {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Copies `bytes` bytes from global memory and fills up to kWidth with zeros. Memory beyond `bytes` is not read.
template <int kWidth>
__device__ __forceinline__ void copy_async(uint32_t dst, const char* src, int bytes) {
  if constexpr (kWidth == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst), "l"(src), "n"(kWidth), "r"(bytes)
                 : "memory");
}
template <int kWidth>
__device__ __forceinline__ void copy_pieces(uint32_t dst, const char* src, int bytes) {
#pragma unroll
  for (int at = 0; at < 16; at += kWidth) {
    const int left = bytes - at < kWidth ? bytes - at : kWidth;
    copy_async<kWidth>(dst + at, left > 0 ? src + at : src, left > 0 ? left : 0);
  }
}
__device__ __forceinline__ void end_of_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void await_stages() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Copies the chunk that begins at column `col` of a row of `cols`. Elements beyond the row's end are zeros, and so are
// all if the row does not exist.
template <class T>
__device__ __forceinline__ void copy_chunk(uint4* dst, const void* base, int64_t row_start, bool exists, int col,
                                           int cols, int width) {
  constexpr int kElements = 16 / sizeof(T);
  const int left = !exists || col >= cols ? 0 : cols - col < kElements ? cols - col : kElements;
  const T* src = static_cast<const T*>(base) + (left ? row_start + col : 0);
  const uint32_t to = shared_address(dst);
  const char* from = reinterpret_cast<const char*>(src);
  const int bytes = left * int(sizeof(T));
  if (width == 16) {
    copy_pieces<16>(to, from, bytes);
  } else if (width == 8) {
    copy_pieces<8>(to, from, bytes);
  } else if (width == 4) {
    copy_pieces<4>(to, from, bytes);
  } else {
    T values[kElements];
#pragma unroll
    for (int j = 0; j < kElements; ++j) values[j] = j < left ? src[j] : T{};
    memcpy(dst, values, 16);
  }
}

template <bool kInnerFirst>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const uint4* chunk) {
  const uint32_t from = shared_address(chunk);
  if constexpr (kInnerFirst)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}

#define ENSADV_MMA(T, type)                                                                               \
  __device__ __forceinline__ void mma(T, float(&c)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, "         \
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                          \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                         \
  }
ENSADV_MMA(half_t, "f16")
ENSADV_MMA(bfloat_t, "bf16")
#undef ENSADV_MMA

// A thread's share of the tile's outputs, as sums.
template <class Tile, class T = typename Tile::T>
struct Sums {
  float c[Tile::kAtomsM][Tile::kAtomsN][4] = {};

  __device__ __forceinline__ void add(const uint4* a, const uint4* b, int warp, int lane) {
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      uint32_t left[Tile::kAtomsM][4], right[Tile::kAtomsN / 2][4];
#pragma unroll
      for (int i = 0; i < Tile::kAtomsM; ++i) load_matrices<false>(left[i], a + Tile::a_chunk(warp, lane, i, step));
#pragma unroll
      for (int j = 0; j < Tile::kAtomsN / 2; ++j)
        load_matrices<Tile::kInnerFirst>(right[j], b + Tile::b_chunk(warp, lane, j, step));
#pragma unroll
      for (int i = 0; i < Tile::kAtomsM; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kAtomsN; ++j)
          mma(T{}, c[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
    }
  }

  __device__ __forceinline__ void store(float* out, int warp, int lane) const {
#pragma unroll
    for (int i = 0; i < Tile::kAtomsM; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kAtomsN; ++j)
#pragma unroll
        for (int v = 0; v < 4; v += 2)
          *reinterpret_cast<float2*>(out + Tile::out_row(warp, lane, i, v) * Tile::kPitch +
                                     Tile::out_col(warp, lane, j, v)) = make_float2(c[i][j][v], c[i][j][v + 1]);
  }
};

// float32 is multiplied without tensor cores, which would round it to TF32.
template <class Tile>
struct Sums<Tile, float> {
  using Share = PlainShare<Tile>;
  float c[Share::kRows][Share::kCols] = {};

  __device__ __forceinline__ void add(const uint4* a, const uint4* b, int warp, int lane) {
    const int thread = warp * kWarpLanes + lane;
#pragma unroll 1
    for (int chunk = 0; chunk < Tile::A::kChunks; ++chunk) {
      float left[Share::kRows][4], right[Share::kCols][4];
#pragma unroll
      for (int i = 0; i < Share::kRows; ++i) memcpy(left[i], a + Tile::A::at(Share::row(thread, i), chunk), 16);
#pragma unroll
      for (int j = 0; j < Share::kCols; ++j) {
        const int col = Share::col(thread, j);
        if constexpr (Tile::kInnerFirst) {
#pragma unroll
          for (int k = 0; k < 4; ++k)
            right[j][k] = reinterpret_cast<const float*>(b + Tile::B::at(chunk * 4 + k, col / 4))[col % 4];
        } else {
          memcpy(right[j], b + Tile::B::at(col, chunk), 16);
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < Share::kRows; ++i)
#pragma unroll
          for (int j = 0; j < Share::kCols; ++j) c[i][j] = fmaf(left[i][k], right[j][k], c[i][j]);
    }
  }

  __device__ __forceinline__ void store(float* out, int warp, int lane) const {
    const int thread = warp * kWarpLanes + lane;
#pragma unroll
    for (int i = 0; i < Share::kRows; ++i)
#pragma unroll
      for (int j = 0; j < Share::kCols; ++j)
        out[Share::row(thread, i) * Tile::kPitch + Share::col(thread, j)] = c[i][j];
  }
};

}  // namespace ensadv
