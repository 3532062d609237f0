// Where a block of the CUDA matrix product keeps its operands. This is index arithmetic alone, so that a test can run
// it on the CPU (csrc/numpy/matrix_tile.cpp).
//
// A block computes kM x kN outputs, kK inner elements at a time. Operands lie in shared memory in chunks of 16 bytes.
// For 16-bit numbers ldmatrix gives each lane its share of the operands of mma.m16n8k16, by the layouts of PTX ISA
// 9.7.14 (mma, ldmatrix). float32 is multiplied without ldmatrix and mma.
#pragma once

#include <cstdint>
#include <type_traits>

#include "platform.h"

namespace ensadv {

// Rows of kCols elements. ldmatrix reads the same chunk of 8 neighbouring rows at once. Chunks are permuted within a
// row so that those 8 lie in different banks: at different offsets modulo 128 bytes.
template <class T, int kRows_, int kCols>
struct SharedTile {
  static constexpr int kRows = kRows_;
  static constexpr int kElements = 16 / int(sizeof(T));    // of a chunk
  static constexpr int kChunks = kCols / kElements;        // of a row
  static constexpr int kRowsAtOnce = kChunks < 8 ? 8 / kChunks : 1;  // rows that fill 128 bytes
  static constexpr int kPatterns = kChunks < 8 ? kChunks : 8;
  static constexpr int kCount = kRows * kChunks;           // chunks in all
  static_assert(kCols % kElements == 0 && (kChunks == 4 || kChunks % 8 == 0));

  static ENSADV_HD int at(int row, int chunk) { return row * kChunks + (chunk ^ row / kRowsAtOnce % kPatterns); }
};

// kInnerFirst: b is stored as [inner, cols], in global and in shared memory; else as [cols, inner].
template <class T_, int kM_, int kN_, int kK_, int kWarpsM, int kWarpsN, bool kInnerFirst_>
struct BlockTile {
  using T = T_;
  static constexpr int kM = kM_, kN = kN_, kK = kK_;
  static constexpr bool kInnerFirst = kInnerFirst_;
  using A = SharedTile<T, kM, kK>;
  using B = std::conditional_t<kInnerFirst, SharedTile<T, kK, kN>, SharedTile<T, kN, kK>>;

  static constexpr int kWarps = kWarpsM * kWarpsN, kThreads = kWarps * kWarpLanes;
  static constexpr int kAtomsM = kM / kWarpsM / 16, kAtomsN = kN / kWarpsN / 8;  // mma instructions per warp
  static constexpr int kSteps = kK / 16;
  static_assert(kM == kWarpsM * kAtomsM * 16 && kN == kWarpsN * kAtomsN * 8 && kAtomsN % 2 == 0);
  static_assert(A::kCount % kThreads == 0 && B::kCount % kThreads == 0);

  static ENSADV_HD int row_of_warp(int warp) { return warp / kWarpsN * kAtomsM * 16; }
  static ENSADV_HD int col_of_warp(int warp) { return warp % kWarpsN * kAtomsN * 8; }

  // The chunk whose address a lane passes to ldmatrix.x4: of a's 16 x 16 elements at atom i, or of b's 16 columns at
  // atoms 2j and 2j + 1. Words 0 and 1 of the result belong to atom 2j.
  static ENSADV_HD int a_chunk(int warp, int lane, int i, int step) {
    return A::at(row_of_warp(warp) + i * 16 + lane % 16, step * 2 + lane / 16);
  }
  static ENSADV_HD int b_chunk(int warp, int lane, int j, int step) {
    const int col = col_of_warp(warp) + j * 16 + lane / 16 * 8, low = lane / 8 % 2;
    return kInnerFirst ? B::at(step * 16 + low * 8 + lane % 8, col / 8) : B::at(col + lane % 8, step * 2 + low);
  }

  // The row and the column of word v of the result's atom (i, j).
  static ENSADV_HD int out_row(int warp, int lane, int i, int v) {
    return row_of_warp(warp) + i * 16 + v / 2 * 8 + lane / 4;
  }
  static ENSADV_HD int out_col(int warp, int lane, int j, int v) {
    return col_of_warp(warp) + j * 8 + lane % 4 * 2 + v % 2;
  }

  // Results pass through shared memory as floats. The padding makes the lanes of a warp write to different banks.
  static constexpr int kPitch = kN + 8;
};

template <class T, bool kInnerFirst>
using LargeTile = BlockTile<T, 128, 128, 32, 2, 4, kInnerFirst>;
template <class T, bool kInnerFirst>
using SmallTile = BlockTile<T, 64, 64, 128 / int(sizeof(T)), 2, 2, kInnerFirst>;

// A thread's share of the outputs where no tensor cores are used. Neighbouring threads have neighbouring columns.
template <class Tile>
struct PlainShare {
  static constexpr int kAcross = 16, kDown = Tile::kThreads / kAcross;
  static constexpr int kRows = Tile::kM / kDown, kCols = Tile::kN / kAcross;
  static ENSADV_HD int row(int thread, int i) { return thread / kAcross + i * kDown; }
  static ENSADV_HD int col(int thread, int j) { return thread % kAcross + j * kAcross; }
};

// The bits that word w of a chunk keeps. The lowest bits of `keep` are the mask of the chunk's elements.
template <class T>
ENSADV_HD uint32_t kept_bits(uint32_t keep, int w) {
  if constexpr (sizeof(T) == 4) return -(keep >> w & 1u);
  return (-(keep >> 2 * w & 1u) & 0xffffu) | (-(keep >> (2 * w + 1) & 1u) & 0xffff0000u);
}

}  // namespace ensadv
