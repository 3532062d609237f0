// A tile is 16 rows of 64 bytes. tdpbf16ps adds to a tile of 16 x 16 floats the product of a tile of 16 rows of 32
// numbers with one of 16 rows of 16 pairs: pair (r, c) holds elements 2r and 2r + 1 of column c (Intel SDM volume 1,
// chapter 18). So one operand is copied as it is, row by row, and the other in pairs. Weights are the larger one, and
// each of their elements meets only the batch: forward it is they that are copied as they are (the product is then
// that of weight and x^T, and tiles of results are turned on their way out), backward they are paired row by row.
#include "amx.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

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
constexpr int kSteps = 16;                     // whose panel of weights, 32 KiB, stays in the L1 cache
constexpr int kGroup = 4;                      // blocks whose columns are read together: one block's are 64 bytes of
                                               // each row, and memory would rather give more of a row at once
constexpr int kRows = 512;                     // of a that are multiplied at once: they and their sums stay in the L2
static_assert(kBlock == kLinearBlock);

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

// sums [kBlock, kBlock] = or += left @ right: two rows of tiles each, `pitch` numbers apart.
void multiply(const uint16_t* left, int64_t left_pitch, const uint16_t* right, int64_t right_pitch, int steps,
              bool add, float* sums) {
  constexpr int kPitch = kBlock * sizeof(float);
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
  for (int s = 0; s < steps; ++s, left += kTileSize, right += kTileSize) {
    ENSADV_TILE_LOAD(4, left, 64);
    ENSADV_TILE_LOAD(6, right, 64);
    ENSADV_TILE_MULTIPLY(0, 4, 6);
    ENSADV_TILE_LOAD(7, right + right_pitch, 64);
    ENSADV_TILE_MULTIPLY(1, 4, 7);
    ENSADV_TILE_LOAD(5, left + left_pitch, 64);
    ENSADV_TILE_MULTIPLY(2, 5, 6);
    ENSADV_TILE_MULTIPLY(3, 5, 7);
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

// Bits [first, first + kStep) of a row's mask.
ENSADV_HD __mmask32 kept_lanes(const uint8_t* keep, int64_t first, int64_t inner) {
  uint32_t bits = 0;
  memcpy(&bits, keep + first / kMaskBits, size_t(std::min<int64_t>(sizeof(bits), bytes_of(inner) - first / kMaskBits)));
  return bits;
}

// Rows of `inner` numbers from `first` on, as they are: tiles of kTile rows, `steps` of them for each kTile rows.
// Beyond the last row and the last number there are zeros.
ENSADV_AMX void copy_rows(const uint16_t* src, int64_t inner, int rows, int padded, int64_t first, int steps,
                          const uint8_t* keep, uint16_t* dst) {
  for (int r = 0; r < padded; ++r) {
    uint16_t* to = dst + int64_t(r / kTile) * steps * kTileSize + r % kTile * kStep;
    for (int s = 0; s < steps; ++s, to += kTileSize) {
      const int64_t i = first + int64_t(s) * kStep;
      __mmask32 lanes = r < rows ? first_lanes(int(std::min<int64_t>(inner - i, kStep))) : 0;
      if (keep && lanes) lanes &= kept_lanes(keep + r * bytes_of(inner), i, inner);
      _mm512_store_si512(to, _mm512_maskz_loadu_epi16(lanes, src + r * inner + i));
    }
  }
}

// The same rows as columns of pairs.
ENSADV_AMX void copy_columns(const uint16_t* src, int64_t inner, int rows, int padded, int steps, uint16_t* dst) {
  for (int r = 0; r < padded; r += kTile)
    for (int s = 0; s < steps; ++s, dst += kTileSize) {
      const int64_t i = int64_t(s) * kStep;
      const __mmask32 lanes = first_lanes(int(std::min<int64_t>(inner - i, kStep)));
      __m512i row[kTile];
      for (int j = 0; j < kTile; ++j)
        row[j] = _mm512_maskz_loadu_epi16(r + j < rows ? lanes : 0, src + (r + j) * inner + i);
      turn(row);
      for (int j = 0; j < kTile; ++j) _mm512_store_si512(dst + j * kStep, row[j]);
    }
}

// `width` columns of rows [first, first + steps * kStep) of `inner`, paired with the row below: two rows of tiles for
// each kBlock columns.
ENSADV_AMX void copy_pairs(const uint16_t* src, int64_t pitch, int64_t inner, int width, int64_t first, int steps,
                           uint16_t* dst) {
  alignas(64) uint16_t order[2][kStep];
  for (int j = 0; j < kStep; ++j) {
    order[0][j] = uint16_t(j / 2 + j % 2 * kStep);
    order[1][j] = uint16_t(order[0][j] + kTile);
  }
  const __m512i left = _mm512_load_si512(order[0]), right = _mm512_load_si512(order[1]);
  const int64_t row_of_tiles = int64_t(steps) * kTileSize;
  for (int p = 0; p < steps * kTile; ++p, dst += kStep) {
    const int64_t i = first + 2 * p;
    uint16_t* to = dst;
    for (int c = 0; c < width; c += kBlock, to += 2 * row_of_tiles) {
      const __mmask32 lanes = first_lanes(width - c);
      const __m512i upper = _mm512_maskz_loadu_epi16(i < inner ? lanes : 0, src + i * pitch + c);
      const __m512i lower = _mm512_maskz_loadu_epi16(i + 1 < inner ? lanes : 0, src + (i + 1) * pitch + c);
      _mm512_store_si512(to, _mm512_permutex2var_epi16(upper, left, lower));
      _mm512_store_si512(to + row_of_tiles, _mm512_permutex2var_epi16(upper, right, lower));
    }
  }
}

ENSADV_AMX inline __m512 widened(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

// One block's results to memory: `rows` rows of `width`.
struct Finish {
  const uint16_t* bias;  // null: none
  uint16_t* out;
  uint8_t* mask;         // null: no activation
  int64_t cols;
  int width;

  ENSADV_AMX void run(const float* sums, bool turned, int rows) const {
    const __mmask32 lanes = first_lanes(width);
    const __m512i more = _mm512_maskz_loadu_epi16(bias ? lanes : 0, bias);
    const __m512 bias_left = widened(_mm512_castsi512_si256(more));
    const __m512 bias_right = widened(_mm512_extracti64x4_epi64(more, 1));
    for (int first = 0; first < rows; first += kTile) {
      __m512i v[2][kTile];
      for (int half = 0; half < 2; ++half) {
        for (int j = 0; j < kTile; ++j)
          v[half][j] = _mm512_load_si512(turned ? sums + (half * kTile + j) * kBlock + first
                                                : sums + (first + j) * kBlock + half * kTile);
        if (turned) turn(v[half]);
      }
      for (int j = 0; j < std::min(kTile, rows - first); ++j)
        row(first + j, _mm512_castsi512_ps(v[0][j]), _mm512_castsi512_ps(v[1][j]), bias_left, bias_right, lanes);
    }
  }

  ENSADV_AMX void row(int64_t r, __m512 left, __m512 right, __m512 bias_left, __m512 bias_right,
                      __mmask32 lanes) const {
    const __m512 zero = _mm512_setzero_ps();
    if (bias) {
      left = _mm512_add_ps(left, bias_left);
      right = _mm512_add_ps(right, bias_right);
    }
    if (mask) {  // NaN is not below 0, and stays
      left = _mm512_mask_mov_ps(left, _mm512_cmp_ps_mask(left, zero, _CMP_LT_OQ), zero);
      right = _mm512_mask_mov_ps(right, _mm512_cmp_ps_mask(right, zero, _CMP_LT_OQ), zero);
    }
    const __m512i y = (__m512i)_mm512_cvtne2ps_pbh(right, left);
    _mm512_mask_storeu_epi16(out + r * cols, lanes, y);
    if (!mask) return;
    const __mmask32 positive = _mm512_cmpgt_epi16_mask(y, _mm512_setzero_si512()) &
                               _mm512_cmple_epi16_mask(y, _mm512_set1_epi16(0x7f80)) & lanes;
    memcpy(mask + r * bytes_of(cols), &positive, size_t(bytes_of(width)));
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
class Blocks {
 public:
  Blocks(const LinearArgs& args, int first_row, int rows)
      : args_(args), first_row_(first_row), rows_(rows), steps_((args.inner + kStep - 1) / kStep),
        padded_((rows + kBlock - 1) / kBlock * kBlock),
        at_once_(args.turned ? kGroup : 1), panel_size_(int64_t(padded_) * steps_ * kStep),
        sums_(int64_t(padded_) * kBlock * at_once_), weights_(int64_t(kBlock) * kSteps * kStep * at_once_),
        panels_((args.reduce ? args.members : 1) * panel_size_) {}

  void run(int64_t begin, int64_t end) {
    const int64_t per_member = (args_.cols + kBlock - 1) / kBlock;
    while (begin < end) {
      const int64_t block = begin % per_member, blocks = std::min({end - begin, per_member - block, at_once_});
      const int first = int(block) * kBlock;
      run(begin / per_member, first, std::min(int(blocks) * kBlock, args_.cols - first));
      begin += blocks;
    }
  }

 private:
  // Columns [first, first + width) of a member, or of all summed.
  void run(int64_t member, int first, int width) {
    const int64_t begin = args_.reduce ? 0 : member, end = args_.reduce ? args_.members : member + 1;
    bool add = false;
    for (int64_t k = begin; k < end; ++k)
      for (int s = 0; s < steps_; s += kSteps, add = true) multiply_steps(k, first, width, s, add);
    if (!add) std::fill_n(sums_.data(), int64_t(padded_) * kBlock * at_once_, 0.0f);  // a sum of nothing
    for (int row = 0; row < rows_; row += kBlock)
      for (int c = 0; c < width; c += kBlock) {
        const int64_t at = member * args_.batch + first_row_ + row;
        const int col = first + c;
        const Finish finish{args_.bias.data ? words(args_.bias) + member * args_.cols + col : nullptr,
                            static_cast<uint16_t*>(args_.out.data) + at * args_.cols + col,
                            args_.mask ? args_.mask + at * bytes_of(args_.cols) + col / kMaskBits : nullptr,
                            args_.cols, std::min(kBlock, width - c)};
        finish.run(sums_of(c, row), !args_.turned, std::min(kBlock, rows_ - row));
      }
  }

  // What steps [s, s + kSteps) of the inner elements add.
  void multiply_steps(int64_t k, int first, int width, int s, bool add) {
    const int steps = std::min(kSteps, steps_ - s);
    const int64_t inner = int64_t(s) * kStep, here = int64_t(steps) * kTileSize, pitch = int64_t(steps_) * kTileSize;
    if (args_.turned)
      copy_pairs(words(args_.b) + k * args_.inner * args_.cols + first, args_.cols, args_.inner, width, inner, steps,
                 weights_.data());
    else
      copy_rows(words(args_.b) + (k * args_.cols + first) * args_.inner, args_.inner, width, kBlock, inner, steps,
                nullptr, weights_.data());
    const uint16_t *panel = panel_of(k) + int64_t(s) * kTileSize, *weights = weights_.data();
    for (int c = 0; c < width; c += kBlock, weights += 2 * here)
      for (int row = 0; row < padded_; row += kBlock) {
        const uint16_t* rows = panel + row / kTile * pitch;
        if (args_.turned) multiply(rows, pitch, weights, here, steps, add, sums_of(c, row));
        else multiply(weights, here, rows, pitch, steps, add, sums_of(c, row));
      }
  }

  static const uint16_t* words(const In& in) { return static_cast<const uint16_t*>(in.data); }
  float* sums_of(int c, int row) const { return sums_.data() + int64_t(c) * padded_ + row * kBlock; }

  // Member k's rows of a in tiles, made when they are first asked for; blocks come member after member.
  const uint16_t* panel_of(int64_t k) {
    uint16_t* panel = panels_.data() + (args_.reduce ? k * panel_size_ : 0);
    if (k <= made_ || (args_.shared && made_ >= 0)) return panel;
    made_ = k;
    const int64_t row = k * args_.batch + first_row_;
    const uint16_t* a = words(args_.a) + (args_.shared ? first_row_ : row) * args_.inner;
    const uint8_t* keep = args_.keep ? args_.keep + row * bytes_of(args_.inner) : nullptr;
    if (args_.turned) copy_rows(a, args_.inner, rows_, padded_, 0, steps_, keep, panel);
    else copy_columns(a, args_.inner, rows_, padded_, steps_, panel);
    return panel;
  }

  const LinearArgs& args_;
  const int first_row_, rows_, steps_, padded_;
  const int64_t at_once_, panel_size_;
  int64_t made_ = -1;
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

void ensemble_linear_amx(const LinearArgs& args, int64_t begin, int64_t end) {
  const Tiles tiles;
  for (int row = 0; row < args.batch; row += kRows)
    Blocks(args, row, std::min(kRows, args.batch - row)).run(begin, end);
}

}  // namespace ensadv
#else
namespace ensadv {
bool has_amx() { return false; }
void ensemble_linear_amx(const LinearArgs&, int64_t, int64_t) {}
}  // namespace ensadv
#endif
