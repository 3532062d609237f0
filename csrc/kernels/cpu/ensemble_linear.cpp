#include "../ensemble_linear.h"

#include <vector>

#include "amx.h"
#include "half.h"
#include "loop.h"

namespace ensadv {
namespace {

constexpr int kRows = 8;      // rows of a that share each load of b's panel
constexpr int kDepth = 128;   // inner elements summed in registers: their panel of b fits the L1 cache, and sums of
                              // such sums lose less than one long sum
constexpr int kN = kLinearBlock;

using Vector = float __attribute__((vector_size(64)));
constexpr int kVectors = kN / 16;

// c += a @ panel, for kRows rows of a; panel is depth x kN. Multiply-add may be fused here: it halves the work, and CPU
// and CUDA sum in different orders anyway, so their bits need not agree.
ENSADV_CLONES ENSADV_FUSES void multiply(const float* const* a, const float* panel, int depth, float* c) {
  ENSADV_FUSE
  Vector sum[kRows][kVectors] = {};
  const float *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5], *a6 = a[6], *a7 = a[7];
  for (int64_t i = 0; i < depth; ++i) {
    Vector b[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) memcpy(&b[v], panel + i * kN + v * 16, sizeof(Vector));
    const float x[kRows] = {a0[i], a1[i], a2[i], a3[i], a4[i], a5[i], a6[i], a7[i]};
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] += x[r] * b[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Vector before;
      memcpy(&before, c + r * kN + v * 16, sizeof(Vector));
      before += sum[r][v];
      memcpy(c + r * kN + v * 16, &before, sizeof(Vector));
    }
}

// dst [columns, kN] = src [rows, columns] transposed.
ENSADV_CLONES void transpose(const float* src, int64_t pitch, int rows, int columns, float* dst) {
  for (int64_t i = 0; i < columns; ++i)
    ENSADV_INDEPENDENT for (int64_t n = 0; n < rows; ++n) dst[i * kN + n] = src[n * pitch + i];
}

ENSADV_HD float keep_or_zero(float v, uint32_t bit) { return bits_float(float_bits(v) & -bit); }
template <class T>
ENSADV_HD T keep_or_zero(T v, uint32_t bit) {
  v.bits &= uint16_t(-bit);
  return v;
}

// drop: dst = src, or 0 where `keep` has a 0; the first bit of keep is that of src[0]. rectify_bits: ReLU of 16-bit
// numbers in place, and whether each is positive, both decided by the pattern without a conversion.
#define ENSADV_DROP(T)                                                                                    \
  ENSADV_CLONES void drop(const uint8_t* keep, int n, const T* src, T* dst) {                             \
    int i = 0;                                                                                            \
    for (; i + kMaskBits <= n; i += kMaskBits) {                                                          \
      const uint32_t bits = keep[i / kMaskBits];                                                          \
      ENSADV_INDEPENDENT for (uint32_t j = 0; j < kMaskBits; ++j)                                         \
        dst[i + j] = keep_or_zero(src[i + j], bits >> j & 1u);                                            \
    }                                                                                                     \
    for (int j = 0; i + j < n; ++j) dst[i + j] = keep_or_zero(src[i + j], keep[i / kMaskBits] >> j & 1u); \
  }
#define ENSADV_RECTIFY(T, infinity)                                   \
  ENSADV_CLONES void rectify_bits(T* v, int n, uint8_t* flags) {      \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) {                  \
      const uint16_t b = v[i].bits;                                   \
      flags[i] = uint16_t(b - 1u) < infinity;                         \
      v[i].bits = uint16_t(b - 0x8001u) < infinity ? uint16_t(0) : b; \
    }                                                                 \
  }
ENSADV_DROP(float)
ENSADV_DROP(half_t)
ENSADV_DROP(bfloat_t)
ENSADV_RECTIFY(half_t, 0x7c00u)
ENSADV_RECTIFY(bfloat_t, 0x7f80u)
#undef ENSADV_DROP
#undef ENSADV_RECTIFY

ENSADV_CLONES void add(const float* bias, int n, float* v) {
  ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) v[i] += bias[i];
}
ENSADV_CLONES void rectify(float* v, int n) {
  ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) v[i] = relu(v[i]);
}
void round_all(const float* v, int n, float* out) { std::copy(v, v + n, out); }
ENSADV_CLONES void round_all(float* v, int n, bfloat_t* out) {
  ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) v[i] = to_compute(out[i] = round_to<bfloat_t>(v[i]));
}
void round_all(float* v, int n, half_t* out) { round_in_place(v, out, n); }

constexpr int kFlags = kStrip + kMaskBits;  // room for the last byte's padding

// The n flags, each 0 or 1, to bits.
ENSADV_CLONES void pack_flags(uint8_t* flags, int n, uint8_t* mask) {
  memset(flags + n, 0, kMaskBits);
  for (int i = 0; i < n; i += kMaskBits) {
    uint64_t bytes;
    memcpy(&bytes, flags + i, sizeof(bytes));
    mask[i / kMaskBits] = uint8_t(bytes * 0x0102040810204080u >> 56);  // byte j, from the lowest, moves to bit j
  }
}
ENSADV_CLONES void flag_positive(const float* v, int n, uint8_t* flags) {
  ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) flags[i] = v[i] > 0.0f;
}

// Finishes and stores n outputs of one row, whose sums are v; v is overwritten. Their bits begin at a byte of the mask.
template <class T>
void finish_row(float* v, const float* bias, int n, uint8_t* mask, T* out) {
  if (bias) add(bias, n, v);
  if (mask) rectify(v, n);
  round_all(v, n, out);
  if (!mask) return;
  uint8_t flags[kFlags];
  flag_positive(v, n, flags);
  pack_flags(flags, n, mask);
}

template <class Body>
void with_linear_dtype(Dtype dtype, Body body) {
  if (dtype == Dtype::f32) body(float());
  if (dtype == Dtype::f16) body(half_t());
  if (dtype == Dtype::bf16) body(bfloat_t());
}

// Computes one block of columns after another.
template <class T>
class Blocks {
 public:
  explicit Blocks(const LinearArgs& args)
      : args_(args), padded_((args.batch + kRows - 1) / kRows * kRows), sums_(size_t(padded_) * kN),
        panel_(size_t(kDepth) * kN), source_(size_t(kDepth) * kN), rows_(size_t(kRows) * kDepth) {}

  void run(int64_t block) {
    const int64_t per_member = (args_.cols + kN - 1) / kN, member = block / per_member;
    first_ = int(block % per_member) * kN;
    width_ = std::min(kN, args_.cols - first_);
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    for (int64_t k = args_.reduce ? 0 : member; k <= (args_.reduce ? args_.members - 1 : member); ++k)
      for (int i = 0; i < args_.inner; i += kDepth) {
        const int depth = std::min(kDepth, args_.inner - i);
        fill_panel(k, i, depth);
        for (int row = 0; row < args_.batch; row += kRows) {
          const float* a[kRows];
          for (int r = 0; r < kRows; ++r) a[r] = row_of_a(k, std::min(row + r, args_.batch - 1), i, depth, r);
          multiply(a, panel_.data(), depth, sums_.data() + int64_t(row) * kN);
        }
      }
    float scratch[kN];
    const float* bias = args_.bias.data ? load(args_.bias, member * args_.cols + first_, width_, scratch) : nullptr;
    for (int64_t row = 0; row < args_.batch; ++row) {
      const int64_t at = member * args_.batch + row;
      uint8_t* mask = args_.mask ? args_.mask + at * mask_bytes(args_.cols) + first_ / kMaskBits : nullptr;
      finish_row(sums_.data() + row * kN, bias, width_, mask,
                 static_cast<T*>(args_.out.data) + at * args_.cols + first_);
    }
  }

 private:
  // This block's columns of b as depth x kN floats; columns beyond the last are 0.
  void fill_panel(int64_t k, int i, int depth) {
    if (args_.inner_first) {
      for (int d = 0; d < depth; ++d) {
        float* dst = panel_.data() + d * kN;
        copy(args_.b, (k * args_.inner + i + d) * args_.cols + first_, width_, dst);
        std::fill(dst + width_, dst + kN, 0.0f);
      }
    } else {
      for (int n = 0; n < width_; ++n)
        copy(args_.b, (k * args_.cols + first_ + n) * args_.inner + i, depth, source_.data() + n * kDepth);
      std::fill(source_.begin() + width_ * kDepth, source_.end(), 0.0f);
      transpose(source_.data(), kDepth, kN, depth, panel_.data());
    }
  }

  static void copy(const In& in, int64_t at, int n, float* dst) {
    const float* src = load(in, at, n, dst);
    if (src != dst) std::copy(src, src + n, dst);
  }

  // Row r of the kRows rows: memory itself, or a converted or masked copy.
  const float* row_of_a(int64_t k, int64_t row, int i, int depth, int r) {
    float* own = rows_.data() + r * kDepth;
    const int64_t at = (args_.shared ? 0 : k) * args_.batch + row;
    if (!args_.keep) return load(args_.a, at * args_.inner + i, depth, own);
    copy(args_.a, at * args_.inner + i, depth, own);
    drop(args_.keep + (k * args_.batch + row) * mask_bytes(args_.inner) + i / kMaskBits, depth, own, own);
    return own;
  }

  const LinearArgs& args_;
  const int padded_;
  int first_ = 0, width_ = 0;
  std::vector<float> sums_, panel_, source_, rows_;
};

}  // namespace

void ensemble_linear_cpu(const LinearArgs& args, int64_t begin, int64_t end) {
  if (begin >= end || args.batch == 0) return;
  if (!has_amx() || !ensemble_linear_amx(args, begin, end)) ensemble_linear_plain_cpu(args, begin, end);
}

void ensemble_linear_plain_cpu(const LinearArgs& args, int64_t begin, int64_t end) {
  with_linear_dtype(args.out.dtype, [&](auto t) {
    Blocks<decltype(t)> blocks(args);
    for (int64_t block = begin; block < end; ++block) blocks.run(block);
  });
}

void ensemble_linear_act_cpu(const LinearActArgs& args, int64_t begin, int64_t end) {
  with_linear_dtype(args.out.dtype, [&](auto t) {
    using T = decltype(t);
    float v[kStrip], scratch[kStrip];
    uint8_t flags[kFlags];
    for (int64_t row = begin; row < end; ++row)
      for (int c = 0; c < args.cols; c += kStrip) {
        const int n = std::min(kStrip, args.cols - c);
        const int64_t at = row * args.cols + c, byte = row * mask_bytes(args.cols) + c / kMaskBits;
        T* out = static_cast<T*>(args.out.data) + at;
        if (args.keep) {
          drop(args.keep + byte, n, static_cast<const T*>(args.a.data) + at, out);
          continue;
        }
        if constexpr (sizeof(T) == 2)
          if (args.mask && !args.bias.data) {
            rectify_bits(out, n, flags);
            pack_flags(flags, n, args.mask + byte);
            continue;
          }
        const float* src = load({args.out.data, args.out.dtype}, at, n, v);
        if (src != v) std::copy(src, src + n, v);
        const float* bias =
            args.bias.data ? load(args.bias, row / args.batch * args.cols + c, n, scratch) : nullptr;
        finish_row(v, bias, n, args.mask ? args.mask + byte : nullptr, out);
      }
  });
}

}  // namespace ensadv
