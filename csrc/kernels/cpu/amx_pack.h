// Numbers to and from tiles: split into bfloat16 parts, paired, transposed, rounded. See amx.cpp.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../ensemble_linear.h"
#include "amx_tiles.h"

namespace ensadv::amx {

template <class T>
constexpr int kParts = sizeof(T) == 4 ? 3 : std::is_same_v<T, half_t> ? 2 : 1;

ENSADV_HD __mmask32 first_lanes(int n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// Transposes 16 x 16 words.
ENSADV_AMX inline void transpose(__m512i (&r)[kTile]) {
  __m512i t[kTile];
  for (int i = 0; i < kTile; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < kTile; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < kTile; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

ENSADV_AMX inline __m512 widen(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

// kStep numbers as floats; 0 outside of `lanes`.
ENSADV_AMX inline void load(const bfloat_t* src, __mmask32 lanes, __m512 (&v)[2]) {
  const __m512i bits = _mm512_maskz_loadu_epi16(lanes, src);
  v[0] = widen(_mm512_castsi512_si256(bits));
  v[1] = widen(_mm512_extracti64x4_epi64(bits, 1));
}
ENSADV_AMX inline void load(const half_t* src, __mmask32 lanes, __m512 (&v)[2]) {
  const __m512i bits = _mm512_maskz_loadu_epi16(lanes, src);
  v[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
  v[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
}
ENSADV_AMX inline void load(const float* src, __mmask32 lanes, __m512 (&v)[2]) {
  v[0] = _mm512_maskz_loadu_ps(__mmask16(lanes), src);
  v[1] = _mm512_maskz_loadu_ps(__mmask16(lanes >> kTile), src + kTile);
}

// Rounds v and stores it. Returns which lanes are positive after rounding.
ENSADV_AMX inline __mmask32 store(const __m512 (&v)[2], __mmask32 lanes, bfloat_t* out) {
  const __m512i y = (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]);
  _mm512_mask_storeu_epi16(out, lanes, y);
  return _mm512_cmpgt_epi16_mask(y, _mm512_setzero_si512()) & _mm512_cmple_epi16_mask(y, _mm512_set1_epi16(0x7f80));
}
ENSADV_AMX inline __mmask32 store(const __m512 (&v)[2], __mmask32 lanes, half_t* out) {
  const __m512i y = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm512_cvtps_ph(v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)),
      _mm512_cvtps_ph(v[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), 1);
  _mm512_mask_storeu_epi16(out, lanes, y);
  return _mm512_cmpgt_epi16_mask(y, _mm512_setzero_si512()) & _mm512_cmple_epi16_mask(y, _mm512_set1_epi16(0x7c00));
}
ENSADV_AMX inline __mmask32 store(const __m512 (&v)[2], __mmask32 lanes, float* out) {
  _mm512_mask_storeu_ps(out, __mmask16(lanes), v[0]);
  _mm512_mask_storeu_ps(out + kTile, __mmask16(lanes >> kTile), v[1]);
  const __m512 zero = _mm512_setzero_ps();
  return _mm512_cmp_ps_mask(v[0], zero, _CMP_GT_OQ) | __mmask32(_mm512_cmp_ps_mask(v[1], zero, _CMP_GT_OQ)) << kTile;
}

// Splits numbers into parts, and notices infinite ones: an infinite part times a part that is 0 would be NaN. For
// float32 and float16, pair j of a step holds elements j and j + kTile, which takes fewer instructions than neighbours.
// bfloat16 numbers need no splitting; their pairs are neighbours in memory.
template <class T>
class Splitter {
 public:
  ENSADV_AMX Splitter() : largest_(_mm512_setzero_si512()) {}

  // Loads kStep numbers as pairs.
  ENSADV_AMX void load_pairs(const T* src, __mmask32 lanes, __m512i (&pairs)[kParts<T>]) {
    if constexpr (kParts<T> == 1) {
      pairs[0] = _mm512_maskz_loadu_epi16(lanes, src);
    } else {
      __m512 v[2];
      load(src, lanes, v);
      pair(v[0], v[1], pairs);
    }
  }

  ENSADV_AMX void pair(__m512 first, __m512 second, __m512i (&pairs)[kParts<T>]) {
#pragma GCC unroll 3
    for (int p = 0; p < kParts<T>; ++p) {
      const bool rest = p + 1 == kParts<T>;  // the rest has no more digits than a part
      const __m512i one = rest ? _mm512_castps_si512(first) : round_to_8_bits(first);
      const __m512i other = rest ? _mm512_castps_si512(second) : round_to_8_bits(second);
      pairs[p] = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(one, 16), other);
      first = _mm512_sub_ps(first, _mm512_castsi512_ps(one));
      second = _mm512_sub_ps(second, _mm512_castsi512_ps(other));
    }
    largest_ = _mm512_max_epu16(largest_, _mm512_add_epi16(pairs[0], pairs[0]));  // the sign is shifted out
  }

  // Were all first parts so far finite? (A NaN's may be: its last part is NaN.)
  ENSADV_AMX bool finite() const { return !_mm512_cmpge_epu16_mask(largest_, _mm512_set1_epi16(int16_t(0xff00))); }

 private:
  // Halves are rounded away from 0.
  ENSADV_AMX static __m512i round_to_8_bits(__m512 v) {
    return _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(0x8000)),
                            _mm512_set1_epi32(int(0xffff0000u)));
  }

  __m512i largest_;
};

// Bits [first, first + kStep) of a mask's row.
ENSADV_HD __mmask32 kept_lanes(const uint8_t* keep, int64_t first, int64_t inner) {
  uint32_t bits = 0;
  const int64_t bytes = mask_bytes(inner) - first / kMaskBits;
  if (bytes >= int64_t(sizeof(bits))) memcpy(&bits, keep + first / kMaskBits, sizeof(bits));
  else memcpy(&bits, keep + first / kMaskBits, size_t(bytes));
  return bits;
}

// Packs rows of `inner` numbers, from number `first` on, as they are: for each kTile rows `steps` tiles, each in its
// parts. Rows and numbers beyond the last are zeros. advance(n) packs n more rows, or all that are left.
template <class T>
class Rows {
 public:
  ENSADV_AMX void start(const T* src, int64_t inner, int rows, int padded, int64_t first, int steps,
                        const uint8_t* keep, uint16_t* dst) {
    src_ = src, inner_ = inner, rows_ = rows, padded_ = padded, first_ = first, steps_ = steps, keep_ = keep;
    dst_ = dst, row_ = 0;
  }
  int left() const { return padded_ - row_; }
  bool finite() const { return splitter_.finite(); }

  ENSADV_AMX __attribute__((noinline)) void advance(int n) {
    Splitter<T> splitter = splitter_;
    for (const int end = row_ + std::min(n, left()); row_ < end; ++row_) {
      uint16_t* to = dst_ + int64_t(row_ / kTile) * steps_ * kParts<T> * kTileSize + row_ % kTile * kStep;
      const T* from = src_ + row_ * inner_ + first_;
      const uint8_t* keep = keep_ ? keep_ + row_ * mask_bytes(inner_) : nullptr;
      for (int s = 0; s < steps_; ++s, from += kStep) {
        const int64_t i = first_ + int64_t(s) * kStep;
        __mmask32 lanes = row_ < rows_ ? first_lanes(int(std::min<int64_t>(inner_ - i, kStep))) : 0;
        if (keep && lanes) lanes &= kept_lanes(keep, i, inner_);
        __m512i pairs[kParts<T>];
        splitter.load_pairs(from, lanes, pairs);
        for (int p = 0; p < kParts<T>; ++p, to += kTileSize) _mm512_store_si512(to, pairs[p]);
      }
    }
    splitter_ = splitter;
  }

 private:
  Splitter<T> splitter_;
  const T* src_ = nullptr;
  const uint8_t* keep_ = nullptr;
  uint16_t* dst_ = nullptr;
  int64_t inner_ = 0, first_ = 0;
  int rows_ = 0, padded_ = 0, steps_ = 0, row_ = 0;
};

// Packs whole rows as columns of pairs. Returns whether all parts were finite.
template <class T>
ENSADV_AMX bool copy_columns(const T* src, int64_t inner, int rows, int padded, int steps, uint16_t* dst) {
  Splitter<T> splitter;
  for (int r = 0; r < padded; r += kTile)
    for (int s = 0; s < steps; ++s) {
      const int64_t i = int64_t(s) * kStep;
      const __mmask32 lanes = first_lanes(int(std::min<int64_t>(inner - i, kStep)));
      __m512i row[kParts<T>][kTile];
      for (int j = 0; j < kTile; ++j) {
        __m512i pairs[kParts<T>];
        splitter.load_pairs(src + (r + j) * inner + i, r + j < rows ? lanes : 0, pairs);
        for (int p = 0; p < kParts<T>; ++p) row[p][j] = pairs[p];
      }
      for (int p = 0; p < kParts<T>; ++p, dst += kTileSize) {
        transpose(row[p]);
        for (int j = 0; j < kTile; ++j) _mm512_store_si512(dst + j * kStep, row[p][j]);
      }
    }
  return splitter.finite();
}

// Packs `width` columns of rows [first, first + steps * kStep) of `inner` in pairs: for each kBlock columns two rows of
// tiles. Each tile of bfloat16 numbers holds every second group of four columns; `restore_order` undoes that in the
// results. advance(n) packs a pair of rows in n times kBlock columns, or all that are left.
template <class T>
class Pairs {
 public:
  void start(const T* src, int64_t pitch, int64_t inner, int width, int64_t first, int steps, uint16_t* dst) {
    src_ = src + first * pitch, pitch_ = pitch, rows_ = inner - first, width_ = width, dst_ = to_ = dst;
    pair_ = c_ = 0, left_ = steps * kTile * ((width + kBlock - 1) / kBlock);
    row_of_tiles_ = int64_t(steps) * kParts<T> * kTileSize;
  }
  int left() const { return left_; }
  bool finite() const { return splitter_.finite(); }

  ENSADV_AMX __attribute__((noinline)) void advance(int n) {
    Splitter<T> splitter = splitter_;  // copies of members, since the stores might alias members
    const int64_t pitch = pitch_, rows = rows_, row_of_tiles = row_of_tiles_;
    const int width = width_;
    int c = c_;
    uint16_t* to = to_;
    n = std::min(n, left_);
    left_ -= n;
    while (n > 0) {
      const int64_t i = kParts<T> == 1 ? 2 * pair_ : 2 * pair_ - pair_ % kTile, below = i + kApart;
      const T *one = src_ + i * pitch, *other = one + kApart * pitch;
      for (; n > 0 && c < width; --n, c += kBlock, to += 2 * row_of_tiles) {
        const __mmask32 lanes = first_lanes(width - c);
        make(splitter, one + c, i < rows ? lanes : 0, other + c, below < rows ? lanes : 0, to, row_of_tiles);
      }
      if (c < width) break;
      ++pair_, c = 0;
      to = dst_ + pair_ / kTile * kParts<T> * kTileSize + pair_ % kTile * kStep;
    }
    c_ = c, to_ = to, splitter_ = splitter;
  }

 private:
  static constexpr int kApart = kParts<T> == 1 ? 1 : kTile;  // between the two rows of a pair

  ENSADV_AMX static void make(Splitter<T>& splitter, const T* one, __mmask32 one_lanes, const T* other,
                              __mmask32 other_lanes, uint16_t* to, int64_t row_of_tiles) {
    if constexpr (kParts<T> == 1) {
      const __m512i upper = _mm512_maskz_loadu_epi16(one_lanes, one);
      const __m512i lower = _mm512_maskz_loadu_epi16(other_lanes, other);
      _mm512_store_si512(to, _mm512_unpacklo_epi16(upper, lower));
      _mm512_store_si512(to + row_of_tiles, _mm512_unpackhi_epi16(upper, lower));
    } else {
      __m512 upper[2], lower[2];
      load(one, one_lanes, upper);
      load(other, other_lanes, lower);
      for (int half = 0; half < 2; ++half, to += row_of_tiles) {
        __m512i pairs[kParts<T>];
        splitter.pair(upper[half], lower[half], pairs);
        for (int p = 0; p < kParts<T>; ++p) _mm512_store_si512(to + p * kTileSize, pairs[p]);
      }
    }
  }

  Splitter<T> splitter_;
  const T* src_ = nullptr;
  uint16_t *dst_ = nullptr, *to_ = nullptr;
  int64_t pitch_ = 0, rows_ = 0, row_of_tiles_ = 0;
  int width_ = 0, pair_ = 0, c_ = 0, left_ = 0;
};

// Puts a row of results, whose columns are in the order of Pairs<T>, in their own order.
template <class T>
ENSADV_AMX inline void restore_order(__m512 (&v)[2]) {
  if constexpr (kParts<T> == 1) {
    const __m512i upper = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i lower = _mm512_add_epi32(upper, _mm512_set1_epi32(8));
    const __m512 first = _mm512_permutex2var_ps(v[0], upper, v[1]);
    v[1] = _mm512_permutex2var_ps(v[0], lower, v[1]);
    v[0] = first;
  }
}

}  // namespace ensadv::amx
