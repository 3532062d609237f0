#include "../bias_act.h"

#include "bits.h"
#include "half.h"
#include "loop.h"

namespace ensadv {
namespace {

#define ENSADV_SUM(T)                                                                                     \
  ENSADV_CLONES void sum_act(const T* x, const compute_t<T>* bias, const T* residual, T* out, int n,      \
                             BiasAct<compute_t<T>> f) {                                                   \
    if (residual)                                                                                         \
      ENSADV_INDEPENDENT for (int i = 0; i < n; ++i)                                                      \
        out[i] = round_to<T>(f(to_compute(x[i]) + bias[i] + to_compute(residual[i])));                    \
    else                                                                                                  \
      ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) out[i] = round_to<T>(f(to_compute(x[i]) + bias[i])); \
  }
ENSADV_SUM(float)
ENSADV_SUM(double)
ENSADV_SUM(bfloat_t)
#undef ENSADV_SUM

// Half precision is converted in bulk (half.h).
void sum_act(const half_t* x, const float* bias, const half_t* residual, half_t* out, int n, BiasAct<float> f) {
  alignas(64) float v[kStrip], r[kStrip];
  convert(x, v, n);
  if (residual) convert(residual, r, n);
  sum_act(v, bias, residual ? r : nullptr, v, n, f);
  round_in_place(v, out, n);
}

// The bias of each element of a strip.
template <class A>
class Biases {
 public:
  explicit Biases(const BiasActArgs& args)
      : bias_(static_cast<const A*>(args.bias)), channels_(args.channels), stride_(args.channel_stride) {
    if (!bias_) std::fill_n(strip_, kStrip, kNoBias<A>);
  }

  // The biases of n elements from i on.
  const A* at(int64_t i, int n) {
    if (!bias_) return strip_;
    const int64_t row = i / stride_, c = row % channels_, ahead = (row + 1) * stride_ - i;
    const bool repeats = stride_ == 1, alike = n <= ahead;
    if ((repeats || alike) && c == first_ && n <= filled_) return strip_;
    if (repeats)
      repeat(c, n);
    else
      spread(c, ahead, n);
    first_ = repeats || alike ? c : -1;
    filled_ = n;
    return strip_;
  }

 private:
  // For channels_last: the channels from c on in turn. The first cycle is copied from memory, then it is doubled.
  void repeat(int64_t c, int64_t n) {
    const int64_t once = std::min(n, channels_), to_last = std::min(once, channels_ - c);
    std::copy_n(bias_ + c, to_last, strip_);
    std::copy_n(bias_, once - to_last, strip_ + to_last);
    for (int64_t k = once, m; k < n; k += m) std::copy_n(strip_, m = std::min(k, n - k), strip_ + k);
  }

  // For planes: each channel's bias for all of its elements. `ahead` elements of channel c are left.
  void spread(int64_t c, int64_t ahead, int64_t n) {
    for (int64_t k = 0, m; k < n; k += m) {
      std::fill_n(strip_ + k, m = std::min(ahead, n - k), bias_[c]);
      ahead = stride_;
      c = c + 1 == channels_ ? 0 : c + 1;
    }
  }

  const A* const bias_;
  const int64_t channels_, stride_;
  int64_t first_ = -1, filled_ = 0;  // the strip's first channel if it determines the strip, else -1; its length
  alignas(64) A strip_[kStrip];
};

}  // namespace

void bias_act_cpu(const BiasActArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.out.dtype, [&](auto t) {
    using T = decltype(t);
    using A = compute_t<T>;
    if constexpr (!std::is_same_v<T, level_t>) {
      static_assert(kStrip % kMaskBlock == 0);
      const T* x = static_cast<const T*>(args.x.data);
      const T* residual = static_cast<const T*>(args.residual.data);
      T* out = static_cast<T*>(args.out.data);
      Biases<A> biases(args);
      const auto f = BiasAct<A>::of(args, t);
      const int64_t last = std::min(end * kMaskBlock, args.numel);
      for_each_strip({}, false, kStrip, begin * kMaskBlock, last, [&](int64_t i, int n, int64_t) {
        sum_act(x + i, biases.at(i, n), residual ? residual + i : nullptr, out + i, n, f);
        if (!args.mask) return;
        // Fetches the next strip while this one, now in the cache, becomes bits. For writing, since out is mostly x.
        const char* next = reinterpret_cast<const char*>(x + i + n);
        for (size_t line = 0; line < size_t(n) * sizeof(T); line += 64) __builtin_prefetch(next + line, 1, 3);
        if (args.act == Act::hardtanh)
          passing_bits(out + i, n, f, args.mask + i / 8);
        else
          positive_bits(out + i, n, args.mask + i / 8);
      });
    }
  });
}

}  // namespace ensadv
