// A tile is 16 rows of 64 bytes. tdpbf16ps adds to a tile of 16 x 16 floats the product of a tile of 16 rows of 32
// numbers with one of 16 rows of 16 pairs: pair (r, c) holds elements 2r and 2r + 1 of column c (Intel SDM volume 1,
// chapter 18). So one operand is copied as it is, row by row, and the other in pairs. Weights are the larger one, and
// each of their elements meets only the batch: forward it is they that are copied as they are (the product is then
// that of weight and x^T, and tiles of results are turned on their way out), backward they are paired row by row.
//
// Wider numbers are sums of bfloat16 numbers, their parts: a half precision one of two, a float of three, each the
// rounded rest of those before it. The product of two numbers is the sum of their parts' products. Of a float's nine
// the three smallest are left out: 2^-23 of the product at the very most, of either sign, and on the average far below
// what float32 sums round away. (Henry, Tang, Heinecke: Leveraging the bfloat16 Artificial Intelligence Datatype For
// Higher-Precision Computations, 2019.) Tiles take parts below 2^-126 for 0.
#include "amx.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__x86_64__) && defined(__linux__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own header leaves undefined what is not used
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#define ENSADV_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace ensadv {
namespace {

constexpr int kTile = 16;                      // rows of a tile, and floats in one
constexpr int kStep = 32;                      // numbers in a row of a tile: what one instruction sums over
constexpr int kTileSize = kTile * kStep;       // numbers in a tile
constexpr int kBlock = 2 * kTile;              // rows and columns that are multiplied together, 2 x 2 tiles
constexpr int kAllSteps = 16;                  // of all parts, whose panel of weights, 32 KiB, stays in the L1 cache
constexpr int kAhead = 8;                      // rows of weights that are fetched before they are paired: each is in
                                               // another page, which the processor does not foresee
constexpr int kAllRows = 512;                  // of a that are multiplied at once: they and their sums stay in the L2
static_assert(kBlock == kLinearBlock);

template <class T>
constexpr int kParts = sizeof(T) == 4 ? 3 : std::is_same_v<T, half_t> ? 2 : 1;
// Blocks whose columns are read together: one block's are 64 or 128 bytes of each row, and memory would rather give
// more of a row at once.
template <class T>
constexpr int kGroup = kParts<T> == 1 ? 4 : 8;
template <class T>
constexpr int kSteps = kAllSteps / kParts<T>;
template <class T>
constexpr int kRows = kParts<T> == 1 ? kAllRows : kAllRows / 2;

// Which parts are multiplied: small products first, and each next to one that it shares a part with.
struct Product {
  int left, right;
};
template <int parts>
constexpr Product kProducts[1] = {{0, 0}};
template <>
constexpr Product kProducts<2>[4] = {{0, 1}, {1, 1}, {1, 0}, {0, 0}};
template <>
constexpr Product kProducts<3>[6] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}, {0, 0}};

struct alignas(64) Configuration {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The tiles as we use them; and as they were configured before, when it ends: torch's library uses them too.
class Tiles {
 public:
  Tiles() {
    asm volatile("sttilecfg %0" : "=m"(before_)::"memory");
    Configuration ours;
    ours.palette = 1;
    for (int t = 0; t < 8; ++t) {
      ours.row_bytes[t] = 64;
      ours.rows[t] = kTile;
    }
    asm volatile("ldtilecfg %0" ::"m"(ours) : "memory");
  }
  ~Tiles() { asm volatile("ldtilecfg %0" ::"m"(before_) : "memory"); }
  Tiles(const Tiles&) = delete;

 private:
  Configuration before_;
};

// Not the compiler's own, which do not tell it that memory is read and written.
#define ENSADV_TILE_LOAD(t, from, pitch) \
  asm volatile("tileloadd (%0, %1, 1), %%tmm" #t ::"r"(from), "r"(int64_t(pitch)) : "memory")
#define ENSADV_TILE_STORE(t, to, pitch) \
  asm volatile("tilestored %%tmm" #t ", (%0, %1, 1)" ::"r"(to), "r"(int64_t(pitch)) : "memory")
#define ENSADV_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::)
#define ENSADV_TILE_MULTIPLY(sum, left, right) \
  asm volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sum ::)

// sums [kBlock, kBlock] = or += left @ right: two rows of tiles each, `pitch` numbers apart, the parts of a step one
// after another.
template <int parts>
void multiply(const uint16_t* left, int64_t left_pitch, const uint16_t* right, int64_t right_pitch, int steps,
              bool add, float* sums) {
  constexpr int kPitch = kBlock * sizeof(float);
  constexpr auto& products = kProducts<parts>;
  constexpr int kCount = sizeof(products) / sizeof(Product);
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
    for (int p = 0; p < kCount; ++p) {
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
    }
  }
  ENSADV_TILE_STORE(0, sums, kPitch);
  ENSADV_TILE_STORE(1, sums + kTile, kPitch);
  ENSADV_TILE_STORE(2, lower, kPitch);
  ENSADV_TILE_STORE(3, lower + kTile, kPitch);
}

ENSADV_HD __mmask32 first_lanes(int n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// 16 x 16 words, turned.
ENSADV_AMX inline void turn(__m512i (&r)[kTile]) {
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

ENSADV_AMX inline __m512 widened(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

// kStep numbers as floats; 0 in other lanes.
ENSADV_AMX inline void load(const bfloat_t* src, __mmask32 lanes, __m512 (&v)[2]) {
  const __m512i bits = _mm512_maskz_loadu_epi16(lanes, src);
  v[0] = widened(_mm512_castsi512_si256(bits));
  v[1] = widened(_mm512_extracti64x4_epi64(bits, 1));
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

// Rounded, to memory; and which are positive then, of all lanes.
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

// Takes numbers apart, and notices those that cannot be: an infinite part times another's 0 would be NaN.
template <class T>
class Splitter {
 public:
  ENSADV_AMX Splitter() : largest_(_mm512_setzero_si512()) {
    alignas(64) uint16_t upper[kStep];
    for (int j = 0; j < kStep; ++j) upper[j] = uint16_t(2 * j + 1);
    upper_ = _mm512_load_si512(upper);
  }

  ENSADV_AMX void load_parts(const T* src, __mmask32 lanes, __m512i (&part)[kParts<T>]) {
    if constexpr (kParts<T> == 1) {
      part[0] = _mm512_maskz_loadu_epi16(lanes, src);
    } else {
      __m512 v[2];
      load(src, lanes, v);
#pragma GCC unroll 2
      for (int p = 0; p + 1 < kParts<T>; ++p) {
        const __m512i left = rounded(v[0]), right = rounded(v[1]);
        if (p == 0)  // without their signs
          largest_ = _mm512_max_epu32(largest_, _mm512_max_epu32(_mm512_add_epi32(left, left),
                                                                 _mm512_add_epi32(right, right)));
        part[p] = _mm512_permutex2var_epi16(left, upper_, right);
        v[0] = _mm512_sub_ps(v[0], _mm512_castsi512_ps(left));
        v[1] = _mm512_sub_ps(v[1], _mm512_castsi512_ps(right));
      }
      part[kParts<T> - 1] =
          _mm512_permutex2var_epi16(_mm512_castps_si512(v[0]), upper_, _mm512_castps_si512(v[1]));
    }
  }

  // Were all parts so far finite? (A NaN's may be: the last one of them is NaN.)
  ENSADV_AMX bool finite() const {
    return !_mm512_cmpge_epu32_mask(largest_, _mm512_set1_epi32(int(0xff000000u)));
  }

 private:
  // To 8 significant bits, halves away from 0.
  ENSADV_AMX static __m512i rounded(__m512 v) {
    return _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(0x8000)),
                            _mm512_set1_epi32(int(0xffff0000u)));
  }

  __m512i largest_, upper_;
};

// Bits [first, first + kStep) of a row's mask.
ENSADV_HD __mmask32 kept_lanes(const uint8_t* keep, int64_t first, int64_t inner) {
  uint32_t bits = 0;
  memcpy(&bits, keep + first / kMaskBits, size_t(std::min<int64_t>(sizeof(bits), bytes_of(inner) - first / kMaskBits)));
  return bits;
}

// Rows of `inner` numbers from `first` on, as they are: tiles of kTile rows, `steps` of them, each in its parts, for
// each kTile rows. Beyond the last row and the last number there are zeros. All three tell whether parts were finite.
template <class T>
ENSADV_AMX bool copy_rows(const T* src, int64_t inner, int rows, int padded, int64_t first, int steps,
                          const uint8_t* keep, uint16_t* dst) {
  Splitter<T> splitter;
  for (int r = 0; r < padded; ++r) {
    uint16_t* to = dst + int64_t(r / kTile) * steps * kParts<T> * kTileSize + r % kTile * kStep;
    for (int s = 0; s < steps; ++s) {
      const int64_t i = first + int64_t(s) * kStep;
      __mmask32 lanes = r < rows ? first_lanes(int(std::min<int64_t>(inner - i, kStep))) : 0;
      if (keep && lanes) lanes &= kept_lanes(keep + r * bytes_of(inner), i, inner);
      __m512i part[kParts<T>];
      splitter.load_parts(src + r * inner + i, lanes, part);
      for (int p = 0; p < kParts<T>; ++p, to += kTileSize) _mm512_store_si512(to, part[p]);
    }
  }
  return splitter.finite();
}

// The same rows as columns of pairs.
template <class T>
ENSADV_AMX bool copy_columns(const T* src, int64_t inner, int rows, int padded, int steps, uint16_t* dst) {
  Splitter<T> splitter;
  for (int r = 0; r < padded; r += kTile)
    for (int s = 0; s < steps; ++s) {
      const int64_t i = int64_t(s) * kStep;
      const __mmask32 lanes = first_lanes(int(std::min<int64_t>(inner - i, kStep)));
      __m512i row[kParts<T>][kTile];
      for (int j = 0; j < kTile; ++j) {
        __m512i part[kParts<T>];
        splitter.load_parts(src + (r + j) * inner + i, r + j < rows ? lanes : 0, part);
        for (int p = 0; p < kParts<T>; ++p) row[p][j] = part[p];
      }
      for (int p = 0; p < kParts<T>; ++p, dst += kTileSize) {
        turn(row[p]);
        for (int j = 0; j < kTile; ++j) _mm512_store_si512(dst + j * kStep, row[p][j]);
      }
    }
  return splitter.finite();
}

// `width` columns of rows [first, first + steps * kStep) of `inner`, paired with the row below: two rows of tiles for
// each kBlock columns.
template <class T>
ENSADV_AMX bool copy_pairs(const T* src, int64_t pitch, int64_t inner, int width, int64_t first, int steps,
                           uint16_t* dst) {
  alignas(64) uint16_t order[2][kStep];
  for (int j = 0; j < kStep; ++j) {
    order[0][j] = uint16_t(j / 2 + j % 2 * kStep);
    order[1][j] = uint16_t(order[0][j] + kTile);
  }
  const __m512i left = _mm512_load_si512(order[0]), right = _mm512_load_si512(order[1]);
  const int64_t row_of_tiles = int64_t(steps) * kParts<T> * kTileSize;
  Splitter<T> splitter;
  for (int pair = 0; pair < steps * kTile; ++pair) {
    const int64_t i = first + 2 * pair;
    uint16_t* to = dst + pair / kTile * kParts<T> * kTileSize + pair % kTile * kStep;
    for (int c = 0; c < width; c += kBlock, to += 2 * row_of_tiles) {
      const __mmask32 lanes = first_lanes(width - c);
      if (i + 1 + kAhead < inner)
        for (int j = 0; j < kBlock; j += int(64 / sizeof(T))) {
          const T* next = src + (i + kAhead) * pitch + c + j;
          _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
          _mm_prefetch(reinterpret_cast<const char*>(next + pitch), _MM_HINT_T0);
        }
      __m512i upper[kParts<T>], lower[kParts<T>];
      splitter.load_parts(src + i * pitch + c, i < inner ? lanes : 0, upper);
      splitter.load_parts(src + (i + 1) * pitch + c, i + 1 < inner ? lanes : 0, lower);
      for (int p = 0; p < kParts<T>; ++p) {
        _mm512_store_si512(to + p * kTileSize, _mm512_permutex2var_epi16(upper[p], left, lower[p]));
        _mm512_store_si512(to + p * kTileSize + row_of_tiles, _mm512_permutex2var_epi16(upper[p], right, lower[p]));
      }
    }
  }
  return splitter.finite();
}

// One block's results to memory: `rows` rows of `width`.
template <class T>
struct Finish {
  const T* bias;  // null: none
  T* out;
  uint8_t* mask;  // null: no activation
  int64_t cols;
  int width;

  ENSADV_AMX void run(const float* sums, bool turned, int rows) const {
    const __mmask32 lanes = first_lanes(width);
    __m512 more[2];
    load(bias, bias ? lanes : 0, more);
    for (int first = 0; first < rows; first += kTile) {
      __m512i v[2][kTile];
      for (int half = 0; half < 2; ++half) {
        for (int j = 0; j < kTile; ++j)
          v[half][j] = _mm512_load_si512(turned ? sums + (half * kTile + j) * kBlock + first
                                                : sums + (first + j) * kBlock + half * kTile);
        if (turned) turn(v[half]);
      }
      for (int j = 0; j < std::min(kTile, rows - first); ++j) {
        __m512 both[2] = {_mm512_castsi512_ps(v[0][j]), _mm512_castsi512_ps(v[1][j])};
        row(first + j, both, more, lanes);
      }
    }
  }

  ENSADV_AMX void row(int64_t r, __m512 (&v)[2], const __m512 (&more)[2], __mmask32 lanes) const {
    const __m512 zero = _mm512_setzero_ps();
    for (int half = 0; half < 2; ++half) {
      if (bias) v[half] = _mm512_add_ps(v[half], more[half]);
      if (mask)  // NaN is not below 0, and stays
        v[half] = _mm512_mask_mov_ps(v[half], _mm512_cmp_ps_mask(v[half], zero, _CMP_LT_OQ), zero);
    }
    const __mmask32 positive = store(v, lanes, out + r * cols) & lanes;
    if (mask) memcpy(mask + r * bytes_of(cols), &positive, size_t(bytes_of(width)));
  }
};

// Memory that tiles are loaded from, not initialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<T*>(aligned_alloc(64, size_t(n * sizeof(T) + 63) / 64 * 64))) {
    if (!data_ && n) throw std::bad_alloc();
  }
  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// Blocks of columns of rows [first_row, first_row + rows), one after another or, of weights that are paired, some at
// once.
template <class T>
class Blocks {
 public:
  Blocks(const LinearArgs& args, int first_row, int rows)
      : args_(args), first_row_(first_row), rows_(rows), steps_((args.inner + kStep - 1) / kStep),
        padded_((rows + kBlock - 1) / kBlock * kBlock),
        at_once_(args.turned || kParts<T> > 1 ? kGroup<T> : 1),
        panel_size_(int64_t(padded_) * steps_ * kParts<T> * kStep), sums_(int64_t(padded_) * kBlock * at_once_),
        weights_(int64_t(kBlock) * kSteps<T> * kParts<T> * kStep * at_once_),
        panels_((args.reduce ? args.members : 1) * panel_size_) {}

  // False: something was not finite, and what was written is worth nothing.
  bool run(int64_t begin, int64_t end) {
    const int64_t per_member = (args_.cols + kBlock - 1) / kBlock;
    while (begin < end && finite_) {
      const int64_t block = begin % per_member, blocks = std::min({end - begin, per_member - block, at_once_});
      const int first = int(block) * kBlock;
      run(begin / per_member, first, std::min(int(blocks) * kBlock, args_.cols - first));
      begin += blocks;
    }
    return finite_;
  }

 private:
  // Columns [first, first + width) of a member, or of all summed.
  void run(int64_t member, int first, int width) {
    const int64_t begin = args_.reduce ? 0 : member, end = args_.reduce ? args_.members : member + 1;
    bool add = false;
    for (int64_t k = begin; k < end; ++k)
      for (int s = 0; s < steps_; s += kSteps<T>, add = true) multiply_steps(k, first, width, s, add);
    if (!add) std::fill_n(sums_.data(), int64_t(padded_) * kBlock * at_once_, 0.0f);  // a sum of nothing
    for (int row = 0; row < rows_; row += kBlock)
      for (int c = 0; c < width; c += kBlock) {
        const int64_t at = member * args_.batch + first_row_ + row;
        const int col = first + c;
        const Finish<T> finish{args_.bias.data ? numbers(args_.bias) + member * args_.cols + col : nullptr,
                               static_cast<T*>(args_.out.data) + at * args_.cols + col,
                               args_.mask ? args_.mask + at * bytes_of(args_.cols) + col / kMaskBits : nullptr,
                               args_.cols, std::min(kBlock, width - c)};
        finish.run(sums_of(c, row), !args_.turned, std::min(kBlock, rows_ - row));
      }
  }

  // What steps [s, s + kSteps) of the inner elements add.
  void multiply_steps(int64_t k, int first, int width, int s, bool add) {
    constexpr int kNumbers = kParts<T> * kTileSize;  // in a step's tiles
    const int steps = std::min(kSteps<T>, steps_ - s);
    const int64_t inner = int64_t(s) * kStep, here = int64_t(steps) * kNumbers, pitch = int64_t(steps_) * kNumbers;
    finite_ &= args_.turned ? copy_pairs(numbers(args_.b) + k * args_.inner * args_.cols + first, args_.cols,
                                         args_.inner, width, inner, steps, weights_.data())
                            : copy_rows(numbers(args_.b) + (k * args_.cols + first) * args_.inner, args_.inner, width,
                                        (width + kBlock - 1) / kBlock * kBlock, inner, steps, nullptr,
                                        weights_.data());
    const uint16_t *panel = panel_of(k) + int64_t(s) * kNumbers, *weights = weights_.data();
    for (int c = 0; c < width; c += kBlock, weights += 2 * here)
      for (int row = 0; row < padded_; row += kBlock) {
        const uint16_t* rows = panel + row / kTile * pitch;
        if (args_.turned) multiply<kParts<T>>(rows, pitch, weights, here, steps, add, sums_of(c, row));
        else multiply<kParts<T>>(weights, here, rows, pitch, steps, add, sums_of(c, row));
      }
  }

  static const T* numbers(const In& in) { return static_cast<const T*>(in.data); }
  float* sums_of(int c, int row) const { return sums_.data() + int64_t(c) * padded_ + row * kBlock; }

  // Member k's rows of a in tiles, made when they are first asked for; blocks come member after member.
  const uint16_t* panel_of(int64_t k) {
    uint16_t* panel = panels_.data() + (args_.reduce ? k * panel_size_ : 0);
    if (k <= made_ || (args_.shared && made_ >= 0)) return panel;
    made_ = k;
    const int64_t row = k * args_.batch + first_row_;
    const T* a = numbers(args_.a) + (args_.shared ? first_row_ : row) * args_.inner;
    const uint8_t* keep = args_.keep ? args_.keep + row * bytes_of(args_.inner) : nullptr;
    finite_ &= args_.turned ? copy_rows(a, args_.inner, rows_, padded_, 0, steps_, keep, panel)
                            : copy_columns(a, args_.inner, rows_, padded_, steps_, panel);
    return panel;
  }

  const LinearArgs& args_;
  const int first_row_, rows_, steps_, padded_;
  const int64_t at_once_, panel_size_;
  int64_t made_ = -1;
  bool finite_ = true;
  const Scratch<float> sums_;
  const Scratch<uint16_t> weights_, panels_;
};

}  // namespace

bool has_amx() {
  static const bool has = [] {
    if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16") ||
        !__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl"))
      return false;
    // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): Linux gives tiles to those who ask.
    long result;
    asm volatile("syscall" : "=a"(result) : "a"(158L), "D"(0x1023L), "S"(18L) : "rcx", "r11", "memory");
    return result == 0;
  }();
  return has;
}

template <class T>
bool by_tiles(const LinearArgs& args, int64_t begin, int64_t end) {
  const Tiles tiles;
  bool finite = true;
  for (int row = 0; row < args.batch && finite; row += kRows<T>)
    finite = Blocks<T>(args, row, std::min(kRows<T>, args.batch - row)).run(begin, end);
  return finite;
}

bool ensemble_linear_amx(const LinearArgs& args, int64_t begin, int64_t end) {
  switch (args.out.dtype) {
    case Dtype::bf16: return by_tiles<bfloat_t>(args, begin, end);
    case Dtype::f16: return by_tiles<half_t>(args, begin, end);
    default: return by_tiles<float>(args, begin, end);
  }
}

}  // namespace ensadv
#else
namespace ensadv {
bool has_amx() { return false; }
bool ensemble_linear_amx(const LinearArgs&, int64_t, int64_t) { return false; }
}  // namespace ensadv
#endif
