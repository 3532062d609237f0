#include "../bias_act.h"

#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>  // of the baseline, so no dispatch
#endif

#include "half.h"
#include "loop.h"

namespace ensadv {
namespace {

#define ENSADV_SUM(A)                                                                                     \
  ENSADV_CLONES void sum_act(const A* x, const A* bias, const A* residual, A* v, int n, BiasAct<A> f) {   \
    if (residual)                                                                                         \
      ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) v[i] = f(x[i] + bias[i] + residual[i]);              \
    else                                                                                                  \
      ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) v[i] = f(x[i] + bias[i]);                            \
  }
ENSADV_SUM(float)
ENSADV_SUM(double)
#undef ENSADV_SUM

void round_all(float* v, half_t* out, int n) { round_in_place(v, out, n); }
ENSADV_CLONES void round_all(const float* v, bfloat_t* out, int n) {
  ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) out[i] = round_to<bfloat_t>(v[i]);
}

// A byte per element, all ones or 0: so far compilers vectorise, and from there one instruction makes 16 bits.
#define ENSADV_FLAGS(T)                                                                        \
  ENSADV_CLONES void flag_positive(const T* y, uint8_t* flags, int n) {                        \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) flags[i] = positive(y[i]) ? 0xff : 0;       \
  }
ENSADV_FLAGS(float)
ENSADV_FLAGS(double)
ENSADV_FLAGS(half_t)
ENSADV_FLAGS(bfloat_t)
#undef ENSADV_FLAGS

void pack(const uint8_t* flags, uint8_t* mask, int n) {
  int i = 0;
#if defined(__SSE2__)
  for (; i + 16 <= n; i += 16) {
    const uint16_t bits = uint16_t(_mm_movemask_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(flags + i))));
    memcpy(mask + i / 8, &bits, 2);
  }
#endif
  for (; i < n; i += 8) {
    uint8_t bits = 0;
    for (int j = 0; j < std::min(8, n - i); ++j) bits |= uint8_t(flags[i + j] & 1u << j);
    mask[i / 8] = bits;
  }
}

// The bias of each element of a tile.
template <class A>
class Biases {
 public:
  explicit Biases(const BiasActArgs& args)
      : bias_(static_cast<const A*>(args.bias)), channels_(args.channels), run_(args.run) {
    if (!bias_) std::fill_n(tile_, kChunk, kNoBias<A>);
  }

  // Those of n elements from i on.
  const A* at(int64_t i, int n) {
    if (!bias_) return tile_;
    const int64_t row = i / run_, c = row % channels_, ahead = (row + 1) * run_ - i;
    const bool repeats = run_ == 1, alike = n <= ahead;
    if ((repeats || alike) && c == first_ && n <= filled_) return tile_;
    if (repeats)
      repeat(c, n);
    else
      spread(c, ahead, n);
    first_ = repeats || alike ? c : -1;
    filled_ = n;
    return tile_;
  }

 private:
  // All channels in turn, from c on: once, and then by doubling.
  void repeat(int64_t c, int64_t n) {
    const int64_t once = std::min(n, channels_), to_last = std::min(once, channels_ - c);
    std::copy_n(bias_ + c, to_last, tile_);
    std::copy_n(bias_, once - to_last, tile_ + to_last);
    for (int64_t k = once, m; k < n; k += m) std::copy_n(tile_, m = std::min(k, n - k), tile_ + k);
  }

  // A run for each channel, from c on, of which `ahead` elements are left.
  void spread(int64_t c, int64_t ahead, int64_t n) {
    for (int64_t k = 0, m; k < n; k += m) {
      std::fill_n(tile_ + k, m = std::min(ahead, n - k), bias_[c]);
      ahead = run_;
      c = c + 1 == channels_ ? 0 : c + 1;
    }
  }

  const A* const bias_;
  const int64_t channels_, run_;
  int64_t first_ = -1, filled_ = 0;  // the tile's first channel, where that tells the tile, and its length
  A tile_[kChunk];
};

}  // namespace

void bias_act_cpu(const BiasActArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.out.dtype, [&](auto t) {
    using T = decltype(t);
    using A = compute_t<T>;
    if constexpr (!std::is_same_v<T, level_t>) {
      static_assert(kChunk % kMaskBlock == 0);
      A xs[kChunk], rs[kChunk], vs[kChunk];
      uint8_t flags[kChunk];
      Biases<A> biases(args);
      const BiasAct<A> f(args.mask);
      const int64_t last = std::min(end * kMaskBlock, args.numel);
      for_each_chunk({}, false, kChunk, begin * kMaskBlock, last, [&](int64_t i, int n, int64_t) {
        const A* x = load(args.x, i, n, xs);
        const A* residual = args.residual.data ? load(args.residual, i, n, rs) : nullptr;
        T* out = static_cast<T*>(args.out.data) + i;
        A* v = computed_in(out, vs);
        sum_act(x, biases.at(i, n), residual, v, n, f);
        if constexpr (kStored<T>) round_all(v, out, n);
        if (!args.mask) return;
        flag_positive(out, flags, n);
        pack(flags, args.mask + i / 8, n);
      });
    }
  });
}

}  // namespace ensadv
