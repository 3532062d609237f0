// Intel AMX: the tile registers, and products of blocks of 2 x 2 tiles. See amx.cpp.
#pragma once

#include <cstdint>

#include "../numeric.h"
#include "x86.h"

namespace ensadv::amx {

constexpr int kTile = 16;                 // rows of a tile, and floats in a row
constexpr int kStep = 32;                 // bfloat16 numbers in a row: one instruction sums over them
constexpr int kTileSize = kTile * kStep;  // numbers in a tile
constexpr int kBlock = 2 * kTile;         // rows and columns of a block of 2 x 2 tiles

// The parts to be multiplied. Small products come first, and neighbours share a part, which is then loaded once.
struct Product {
  int left, right;
};
template <int parts>
constexpr Product kProducts[1] = {{0, 0}};
template <>
constexpr Product kProducts<2>[4] = {{0, 1}, {1, 1}, {1, 0}, {0, 0}};
template <>
constexpr Product kProducts<3>[6] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}, {0, 0}};
template <int parts>
constexpr int kCount = sizeof(kProducts<parts>) / sizeof(Product);

struct alignas(64) Configuration {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Configures the tiles. The destructor restores the configuration before, because torch's library uses tiles too.
class ConfiguredTiles {
 public:
  ConfiguredTiles() {
    asm volatile("sttilecfg %0" : "=m"(before_)::"memory");
    Configuration ours;
    ours.palette = 1;
    for (int t = 0; t < 8; ++t) {
      ours.row_bytes[t] = 64;
      ours.rows[t] = kTile;
    }
    asm volatile("ldtilecfg %0" ::"m"(ours) : "memory");
  }
  ~ConfiguredTiles() { asm volatile("ldtilecfg %0" ::"m"(before_) : "memory"); }
  ConfiguredTiles(const ConfiguredTiles&) = delete;

 private:
  Configuration before_;
};

// Not the compiler's own intrinsics, which do not tell it that memory is read and written.
#define ENSADV_TILE_LOAD(t, from, pitch) \
  asm volatile("tileloadd (%0, %1, 1), %%tmm" #t ::"r"(from), "r"(int64_t(pitch)) : "memory")
#define ENSADV_TILE_STORE(t, to, pitch) \
  asm volatile("tilestored %%tmm" #t ", (%0, %1, 1)" ::"r"(to), "r"(int64_t(pitch)) : "memory")
#define ENSADV_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::)
#define ENSADV_TILE_MULTIPLY(sum, left, right) \
  asm volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sum ::)

// sums [kBlock, kBlock] = left @ right, or += where `add`. Each operand is two rows of tiles, `pitch` numbers apart;
// the parts of a step follow each other. The processor multiplies tiles beside its other work: after every four
// products `aside` does `share` of its work.
template <int parts, class Aside>
ENSADV_AMX void multiply(const uint16_t* left, int64_t left_pitch, const uint16_t* right, int64_t right_pitch,
                         int steps, bool add, float* sums, Aside& aside, int share) {
  constexpr int kPitch = kBlock * sizeof(float);
  constexpr auto& products = kProducts<parts>;
  float* lower = sums + kTile * kBlock;
  if (add) {
    ENSADV_TILE_LOAD(0, sums, kPitch);
    ENSADV_TILE_LOAD(1, sums + kTile, kPitch);
    ENSADV_TILE_LOAD(2, lower, kPitch);
    ENSADV_TILE_LOAD(3, lower + kTile, kPitch);
  } else {
    ENSADV_TILE_ZERO(0);
    ENSADV_TILE_ZERO(1);
    ENSADV_TILE_ZERO(2);
    ENSADV_TILE_ZERO(3);
  }
  for (int s = 0; s < steps; ++s, left += parts * kTileSize, right += parts * kTileSize) {
#pragma GCC unroll 6
    for (int p = 0; p < kCount<parts>; ++p) {
      const bool new_left = p == 0 || products[p].left != products[p - 1].left;
      const bool new_right = p == 0 || products[p].right != products[p - 1].right;
      const uint16_t *upper_left = left + products[p].left * kTileSize, *first = right + products[p].right * kTileSize;
      if (new_left) ENSADV_TILE_LOAD(4, upper_left, 64);
      if (new_right) ENSADV_TILE_LOAD(6, first, 64);
      ENSADV_TILE_MULTIPLY(0, 4, 6);
      if (new_right) ENSADV_TILE_LOAD(7, first + right_pitch, 64);
      ENSADV_TILE_MULTIPLY(1, 4, 7);
      if (new_left) ENSADV_TILE_LOAD(5, upper_left + left_pitch, 64);
      ENSADV_TILE_MULTIPLY(2, 5, 6);
      ENSADV_TILE_MULTIPLY(3, 5, 7);
      if (aside.left()) aside.advance(share);
    }
  }
  ENSADV_TILE_STORE(0, sums, kPitch);
  ENSADV_TILE_STORE(1, sums + kTile, kPitch);
  ENSADV_TILE_STORE(2, lower, kPitch);
  ENSADV_TILE_STORE(3, lower + kTile, kPitch);
}

}  // namespace ensadv::amx
