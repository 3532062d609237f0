// A tile is 16 rows of 64 bytes. tdpbf16ps multiplies a tile of 16 rows of 32 bfloat16 numbers by a tile of 16 rows of
// 16 pairs and adds the product to a tile of 16 x 16 floats; pair (r, c) holds elements 2r and 2r + 1 of column c
// (Intel SDM volume 1, chapter 18). So one operand is copied row by row as it is, and the other in pairs. The weights
// are the larger operand, and each of them is multiplied by the batch alone, so copying them must be cheap. Forward
// they are copied as they are: the product is weight @ x^T, and tiles of results are transposed at the end. Backward,
// rows are paired.
//
// A wider number is split into bfloat16 parts that add up to it: a half precision number into two, a float into three,
// each the rounded rest of those before it. A product of two numbers is the sum of the products of their parts. For
// floats the three smallest of nine are left out: at most 2^-23 of the product, of either sign, and on average far less
// than float32 sums lose by rounding. (Henry, Tang, Heinecke: Leveraging the bfloat16 Artificial Intelligence Datatype
// For Higher-Precision Computations, 2019.) The tile multiplier treats parts below 2^-126 as 0.
#include "amx.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own header of intrinsics leaves unused vectors undefined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "x86.h"

#if defined(ENSADV_X86) && defined(__linux__)
#include "amx_pack.h"

namespace ensadv {
namespace {

using namespace amx;

constexpr int kAllRows = 512;  // of a, multiplied in one pass: the rows and their sums fit the L2 cache
constexpr int kGroup = 8;      // blocks whose columns are read together, for longer reads from each row
constexpr int kBurst = 4;      // packing does so many shares at a time: smaller portions take longer in all
constexpr int kLong = 16;      // steps of one float32 sum: sums of such sums lose less than one long sum
static_assert(kBlock == kLinearBlock);

// Steps whose weights for a block, 16 or 32 KiB, fit the L1 cache.
template <class T, bool inner_first>
constexpr int kSteps = (inner_first || kParts<T> > 1 ? 8 : 16) / kParts<T>;
template <class T>
constexpr int kRows = kParts<T> == 1 ? kAllRows : kAllRows / 2;

// Writes the results of blocks to memory, in rows of `width`.
template <class T>
struct Finish {
  const T* bias;  // null: none
  T* out;
  uint8_t* mask;  // null: no activation
  int64_t cols;
  int width;

  // Of several blocks, whose sums are `size` floats apart. Row by row, because rows of results lie in different pages.
  ENSADV_AMX void run_rows(const float* sums, int64_t size, int rows) const {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < width; c += kBlock) {
        const float* from = sums + c / kBlock * size + r * kBlock;
        __m512 v[2] = {_mm512_load_ps(from), _mm512_load_ps(from + kTile)};
        restore_order<T>(v);
        row(r, c, v);
      }
  }

  // Of one block, whose sums have the batch along their rows.
  ENSADV_AMX void run_transposed(const float* sums, int rows) const {
    for (int first = 0; first < rows; first += kTile) {
      __m512i v[2][kTile];
      for (int half = 0; half < 2; ++half) {
        for (int j = 0; j < kTile; ++j) v[half][j] = _mm512_load_si512(sums + (half * kTile + j) * kBlock + first);
        transpose(v[half]);
      }
      for (int j = 0; j < std::min(kTile, rows - first); ++j) {
        __m512 both[2] = {_mm512_castsi512_ps(v[0][j]), _mm512_castsi512_ps(v[1][j])};
        row(first + j, 0, both);
      }
    }
  }

 private:
  ENSADV_AMX void row(int64_t r, int c, __m512 (&v)[2]) const {
    const __m512 zero = _mm512_setzero_ps();
    const __mmask32 lanes = first_lanes(width - c);
    if (bias) {
      __m512 more[2];
      load(bias + c, lanes, more);
      for (int half = 0; half < 2; ++half) v[half] = _mm512_add_ps(v[half], more[half]);
    }
    if (mask)  // NaN is not below 0, so it stays
      for (int half = 0; half < 2; ++half)
        v[half] = _mm512_mask_mov_ps(v[half], _mm512_cmp_ps_mask(v[half], zero, _CMP_LT_OQ), zero);
    const __mmask32 positive = store(v, lanes, out + r * cols + c) & lanes;
    if (mask)
      memcpy(mask + r * mask_bytes(cols) + c / kMaskBits, &positive, size_t(mask_bytes(std::min(kBlock, width - c))));
  }
};

// Uninitialised memory for tiles. A thread keeps up to kMaxCached bytes of it for its next call, because getting fresh
// pages takes as long as a small product.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    if (bytes > kMaxCached) own_.reset(allocate(bytes));
    else if (bytes > cached().bytes) cached().data.reset(allocate(bytes)), cached().bytes = bytes;
    next_ = own_ ? own_.get() : cached().data.get();
  }

  // Room for n numbers. n is a multiple of a tile's row, so that all that is taken is aligned.
  template <class T>
  T* take(int64_t n) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += size_t(n) * sizeof(T);
    return taken;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  using Memory = std::unique_ptr<char, Free>;
  struct Cached {
    Memory data;
    size_t bytes = 0;
  };
  static constexpr size_t kMaxCached = 8 << 20;

  static Cached& cached() {
    thread_local Cached cached;
    return cached;
  }
  static char* allocate(size_t bytes) {
    char* data = static_cast<char*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (!data) throw std::bad_alloc();
    return data;
  }

  Memory own_;
  char* next_;
};

// The product for rows [first_row, first_row + rows), some blocks of columns at a time. While the weights of one piece
// are multiplied, those of the next are packed into tiles.
template <class T, bool inner_first>
class Blocks {
 public:
  Blocks(const LinearArgs& args, int first_row, int rows)
      : args_(args), first_row_(first_row), rows_(rows),
        steps_(args.reduce && !args.members ? 0 : (args.inner + kStep - 1) / kStep),
        // All of them, if they are few: the sums are then written once.
        steps_at_once_(inner_first && steps_ <= 2 * kSteps<T, inner_first> ? steps_ : kSteps<T, inner_first>),
        padded_((rows + kBlock - 1) / kBlock * kBlock),
        at_once_(std::min<int64_t>(inner_first || kParts<T> > 1 ? kGroup : 1, per_member())),
        panel_size_(int64_t(padded_) * steps_ * kParts<T> * kStep),
        scratch_((sums_size() + totals_size()) * sizeof(float) +
                 (2 * weights_size() + panels_size()) * sizeof(uint16_t)),
        sums_(scratch_.take<float>(sums_size())), totals_(scratch_.take<float>(totals_size())),
        weights_{scratch_.take<uint16_t>(weights_size()), scratch_.take<uint16_t>(weights_size())},
        panels_(scratch_.take<uint16_t>(panels_size())) {}

  // False: a part was not finite, and the results are wrong.
  bool run(int64_t begin, int64_t end) {
    Piece piece = group(begin, end, 1);  // one block first: its packing overlaps no multiplication
    start(piece, 0);
    for (int buffer = 0; piece.blocks; buffer ^= 1) {
      while (packer_.left()) packer_.advance(packer_.left());
      const uint16_t* panel = panel_of(piece.k);
      if (!finite_ || !packer_.finite()) return false;
      const Piece next = after(piece, end);
      if (next.blocks) start(next, buffer ^ 1);
      multiply_piece(piece, panel, weights_[buffer]);
      if (next.block != piece.block) finish(piece);
      piece = next;
    }
    return true;
  }

 private:
  // Blocks [block, block + blocks) by steps [s, s + steps_at_once_) of member k's inner elements.
  struct Piece {
    int64_t block, blocks, k;
    int s;
  };

  Piece group(int64_t block, int64_t end, int64_t max_blocks) const {
    const int64_t left = per_member() - block % per_member();
    return {block, std::min({end - block, left, at_once_, max_blocks}), args_.reduce ? 0 : block / per_member(), 0};
  }

  Piece after(Piece p, int64_t end) const {
    p.s += steps_at_once_;
    if (p.s < steps_) return p;
    p.s = 0;
    if (args_.reduce && p.k + 1 < args_.members) return ++p.k, p;
    return group(p.block + p.blocks, end, 2 * p.blocks);
  }

  // Sets the packer to this piece's weights. It packs them into weights_[buffer], a few at a time.
  void start(const Piece& p, int buffer) {
    const int first = first_column(p);
    if constexpr (inner_first)
      packer_.start(numbers(args_.b) + p.k * args_.inner * args_.cols + first, args_.cols, args_.inner, width(p),
                    int64_t(p.s) * kStep, steps(p), weights_[buffer]);
    else
      packer_.start(numbers(args_.b) + (p.k * args_.cols + first) * args_.inner, args_.inner, width(p),
                    int(p.blocks) * kBlock, int64_t(p.s) * kStep, steps(p), nullptr, weights_[buffer]);
  }

  void multiply_piece(const Piece& p, const uint16_t* panel, const uint16_t* weights) {
    constexpr int kNumbers = kParts<T> * kTileSize;  // in a step's tiles
    const int64_t piece_pitch = int64_t(steps(p)) * kNumbers, pitch = int64_t(steps_) * kNumbers;
    const int64_t fours = p.blocks * (padded_ / kBlock) * std::max(1, steps(p)) * kCount<kParts<T>>;
    const int share = kBurst * int((packer_.left() + fours - 1) / fours);
    const bool first = p.s == 0 && (!args_.reduce || p.k == 0);
    const bool add = !first && (!totals_size() || p.s % kLong != 0);
    if (!add && !first) add_up(totals_, sums_, p);
    panel += int64_t(p.s) * kNumbers;
    for (int64_t c = 0; c < p.blocks; ++c, weights += 2 * piece_pitch)
      for (int row = 0; row < padded_; row += kBlock) {
        const uint16_t* rows = panel + row / kTile * pitch;
        float* sums = sums_of(c, row);
        if constexpr (inner_first)
          multiply<kParts<T>>(rows, pitch, weights, piece_pitch, steps(p), add, sums, packer_, share);
        else
          multiply<kParts<T>>(weights, piece_pitch, rows, pitch, steps(p), add, sums, packer_, share);
      }
  }

  // to += from for the sums of these blocks, or to = from the first time.
  ENSADV_AMX void add_up(float* to, const float* from, const Piece& p) {
    const int64_t n = p.blocks * padded_ * kBlock;
    if (!has_totals_) std::copy(from, from + n, to);
    else for (int64_t i = 0; i < n; ++i) to[i] += from[i];
    has_totals_ = true;
  }

  void finish(const Piece& p) {
    if (has_totals_) add_up(sums_, totals_, p);
    has_totals_ = false;
    const int64_t member = p.block / per_member(), at = member * args_.batch + first_row_;
    const int first = first_column(p);
    if constexpr (inner_first)
      finish_at(member, at, first, width(p)).run_rows(sums_, int64_t(padded_) * kBlock, rows_);
    else
      for (int row = 0; row < rows_; row += kBlock)
        for (int64_t c = 0; c < p.blocks; ++c) {
          const int col = first + int(c) * kBlock;
          finish_at(member, at + row, col, std::min(kBlock, args_.cols - col))
              .run_transposed(sums_of(c, row), std::min(kBlock, rows_ - row));
        }
  }

  // The writer of a member's results from row `at` and column `col` on.
  Finish<T> finish_at(int64_t member, int64_t at, int col, int width) const {
    return {args_.bias.data ? numbers(args_.bias) + member * args_.cols + col : nullptr,
            static_cast<T*>(args_.out.data) + at * args_.cols + col,
            args_.mask ? args_.mask + at * mask_bytes(args_.cols) + col / kMaskBits : nullptr, args_.cols, width};
  }

  static const T* numbers(const In& in) { return static_cast<const T*>(in.data); }
  int64_t per_member() const { return (args_.cols + kBlock - 1) / kBlock; }
  int first_column(const Piece& p) const { return int(p.block % per_member()) * kBlock; }
  int width(const Piece& p) const { return std::min(int(p.blocks) * kBlock, args_.cols - first_column(p)); }
  int steps(const Piece& p) const { return std::min(steps_at_once_, steps_ - p.s); }
  int64_t sums_size() const { return int64_t(padded_) * kBlock * at_once_; }
  int64_t weights_size() const {
    return int64_t(kBlock) * std::min(steps_at_once_, steps_) * kParts<T> * kStep * at_once_;
  }
  int64_t totals_size() const { return sizeof(T) == 4 ? sums_size() : 0; }
  int64_t panels_size() const { return (args_.reduce ? args_.members : 1) * panel_size_; }
  float* sums_of(int64_t c, int row) const { return sums_ + (c * padded_ + row) * kBlock; }

  // Member k's rows of a in tiles. They are packed at the first call for k; k never decreases.
  const uint16_t* panel_of(int64_t k) {
    uint16_t* panel = panels_ + (args_.reduce ? k * panel_size_ : 0);
    if (k <= made_ || (args_.shared && made_ >= 0)) return panel;
    made_ = k;
    const int64_t row = k * args_.batch + first_row_;
    const T* a = numbers(args_.a) + (args_.shared ? first_row_ : row) * args_.inner;
    const uint8_t* keep = args_.keep ? args_.keep + row * mask_bytes(args_.inner) : nullptr;
    if constexpr (inner_first) {
      Rows<T> copy;
      copy.start(a, args_.inner, rows_, padded_, 0, steps_, keep, panel);
      copy.advance(padded_);
      finite_ &= copy.finite();
    } else {
      finite_ &= copy_columns(a, args_.inner, rows_, padded_, steps_, panel);
    }
    return panel;
  }

  const LinearArgs& args_;
  const int first_row_, rows_, steps_, steps_at_once_, padded_;
  const int64_t at_once_, panel_size_;
  int64_t made_ = -1;
  bool finite_ = true, has_totals_ = false;
  std::conditional_t<inner_first, Pairs<T>, Rows<T>> packer_;
  Scratch scratch_;
  float *const sums_, *const totals_;
  uint16_t *const weights_[2], *const panels_;
};

}  // namespace

bool has_amx() {
  static const bool has = [] {
    if (!x86::has_amx_bf16()) return false;
    // Linux grants the use of tiles on request: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
    long result;
    asm volatile("syscall" : "=a"(result) : "a"(158L), "D"(0x1023L), "S"(18L) : "rcx", "r11", "memory");
    return result == 0;
  }();
  return has;
}

template <class T, bool inner_first>
bool multiply_by_tiles(const LinearArgs& args, int64_t begin, int64_t end) {
  const ConfiguredTiles tiles;
  bool finite = true;
  for (int row = 0; row < args.batch && finite; row += kRows<T>)
    finite = Blocks<T, inner_first>(args, row, std::min(kRows<T>, args.batch - row)).run(begin, end);
  return finite;
}

template <class T>
bool multiply_by_tiles(const LinearArgs& args, int64_t begin, int64_t end) {
  if (args.inner_first) return multiply_by_tiles<T, true>(args, begin, end);
  return multiply_by_tiles<T, false>(args, begin, end);
}

bool ensemble_linear_amx(const LinearArgs& args, int64_t begin, int64_t end) {
  switch (args.out.dtype) {
    case Dtype::bf16: return multiply_by_tiles<bfloat_t>(args, begin, end);
    case Dtype::f16: return multiply_by_tiles<half_t>(args, begin, end);
    default: return multiply_by_tiles<float>(args, begin, end);
  }
}

}  // namespace ensadv
#else
namespace ensadv {
bool has_amx() { return false; }
bool ensemble_linear_amx(const LinearArgs&, int64_t, int64_t) { return false; }
}  // namespace ensadv
#endif