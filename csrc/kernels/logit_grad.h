// logit_grad: labels by rule, the loss per sample, and its gradient by the logits times a power of two.
//
// This file holds the formulas, which both devices share; each device has its own way to reduce over a row. `rest` is
// the sum of a row's exponentials without the largest. For a confident right prediction the loss is log1p(rest) and its
// gradient by the label's logit is rest / total: computed so, cancellation costs neither of them any digits.
#pragma once

#include <cmath>

#include "numeric.h"
#include "philox.h"
#include "tensor_ref.h"

namespace ensadv {

enum class Rule : int32_t { given, predicted, least_likely, random };  // given: as predicted where `given` is null
enum class Loss : int32_t { ce, cw, dlr };
enum class Fuse : int32_t { logits, probs, loss };  // for one member: logits

struct LogitGradArgs {
  In logits;  // [members, batch, classes]
  Out grad;   // same dtype and shape
  const int64_t* given = nullptr;  // [batch]
  int64_t* labels = nullptr;       // [batch]
  void* losses = nullptr;          // [batch], compute type
  void* scales = nullptr;          // [batch], compute type
  const void* weights = nullptr;   // [members], compute type; null: 1 / members each
  const int64_t* key = nullptr;    // for Rule::random
  const int64_t* index = nullptr;  // [batch]
  int64_t members = 1, batch = 0;
  int32_t classes = 1;
  Rule rule = Rule::given;
  Loss loss = Loss::ce;
  Fuse fuse = Fuse::logits;
  bool targeted = false, rescale = true;
  double kappa = 0.0;
};

template <class A>
ENSADV_HD A weight_of(const LogitGradArgs& args, int64_t k) {
  return args.weights ? static_cast<const A*>(args.weights)[k] : A(1) / A(args.members);
}

// e^x for x <= 0, within one unit in the last place even where the result is subnormal. NaN stays NaN. The arithmetic
// is plain (Cody and Waite's reduction, Cephes' polynomial), so that loops vectorise and CPU and CUDA agree.
ENSADV_HD float exp_nonpositive(float x) {
  x = x < -104.0f ? -104.0f : x;                                    // e^-104 rounds to 0
  const float shifted = x * 1.44269504f + 12582912.0f;              // 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;     // n * 355/512 is exact
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  const int32_t k = int32_t(float_bits(shifted) - 0x4b400000u);     // n as an integer
  const int32_t half = k >> 1;                                      // 2^n may be subnormal: two factors
  return p * bits_float(uint32_t(half + 127) << 23) * bits_float(uint32_t(k - half + 127) << 23);
}
ENSADV_HD double exp_nonpositive(double x) { return exp(x); }

// A float's ordinal: an integer that compares as the float does, for argmax. Both zeros have the same one, and NaN has
// the highest. The lowest integer, kNoOrdinal, stands for no number.
template <class A>
struct OrdinalOf;
template <>
struct OrdinalOf<float> {
  using type = int32_t;
};
template <>
struct OrdinalOf<double> {
  using type = int64_t;
};
template <class A>
using ordinal_t = typename OrdinalOf<A>::type;

ENSADV_HD int32_t ordinal_of(float v) {
  const int32_t bits = int32_t(float_bits(v + 0.0f));
  const int32_t k = bits ^ ((bits >> 31) & 0x7fffffff);
  return v != v ? 0x7fffffff : k;
}
ENSADV_HD int64_t ordinal_of(double v) {
  int64_t bits;
  v += 0.0;
  memcpy(&bits, &v, 8);
  const int64_t k = bits ^ ((bits >> 63) & 0x7fffffffffffffff);
  return v != v ? 0x7fffffffffffffff : k;
}
ENSADV_HD float from_ordinal(int32_t k) { return bits_float(uint32_t(k ^ ((k >> 31) & 0x7fffffff))); }
ENSADV_HD double from_ordinal(int64_t k) {
  k ^= (k >> 63) & 0x7fffffffffffffff;
  double v;
  memcpy(&v, &k, 8);
  return v;
}
template <class A>
constexpr ordinal_t<A> kNoOrdinal = sizeof(A) == 4 ? ordinal_t<A>(INT32_MIN) : ordinal_t<A>(INT64_MIN);

template <class A>
struct Softmax {
  A max = 0;        // of the logits z
  A rest = 0;       // the sum of e^(z - max) over all entries but `top`
  A second = 0;     // the largest term of `rest`
  int32_t top = 0;  // the lowest index of the maximum

  ENSADV_HD A zero() const { return max - max; }  // NaN where max, and so softmax, is not finite
  ENSADV_HD A total() const { return zero() + A(1) + rest; }
  // Over all entries but y, whose logit is `own`: the sum of e^(z - max), without cancellation, and the largest
  // probability.
  ENSADV_HD A sum_except(int32_t y, A own) const {
    return y == top ? zero() + rest : total() - exp_nonpositive(own - max);
  }
  ENSADV_HD A largest_except(int32_t y) const { return (y == top ? second : A(1)) / total(); }
  ENSADV_HD A log_probability(A own) const { return (own - max) - log1p(rest) + zero(); }
};

// log(sum_k w_k p_k) of one class, from the members' log-probabilities. Each goes to `find_max`, then each to `add`.
template <class A>
struct LogMean {
  A max = -A(INFINITY), sum = 0;

  ENSADV_HD void find_max(A weight, A logp) { max = weight > A(0) && logp > max ? logp : max; }
  ENSADV_HD void add(A weight, A logp) { sum += part(weight, logp); }
  ENSADV_HD A part(A weight, A logp) const { return weight > A(0) ? weight * exp_nonpositive(logp - max) : A(0); }
  ENSADV_HD A value() const { return max + log(sum); }
};

// Mixes the members' log-probabilities logp(k) of one class.
template <class A>
struct Mixture {
  LogMean<A> mean;
  A loss = 0, total = 0;  // the weighted sum of the members' losses, and the sum of the weights

  template <class LogP>
  ENSADV_HD Mixture(const LogitGradArgs& args, LogP logp) {
    for (int64_t k = 0; k < args.members; ++k) {
      const A weight = weight_of<A>(args, k), v = logp(k);
      mean.find_max(weight, v);
      loss -= weight * v;
      total += weight;
    }
    for (int64_t k = 0; k < args.members; ++k) mean.add(weight_of<A>(args, k), logp(k));
  }
};

// The power of two, at most 2^100, that scales `largest` into [1, 2). It is 1 where `largest` is 0 or NaN.
ENSADV_HD float lift(float largest) {
  if (!(largest > 0.0f)) return 1.0f;
  const int32_t e = 127 - int32_t(float_bits(largest) >> 23);
  return bits_float(uint32_t((e > 100 ? 100 : e) + 127) << 23);
}
ENSADV_HD double lift(double largest) {
  if (!(largest > 0.0)) return 1.0;
  uint64_t bits;
  memcpy(&bits, &largest, 8);
  const int64_t e = 1023 - int64_t(bits >> 52);
  bits = uint64_t((e > 100 ? 100 : e) + 1023) << 52;
  double result;
  memcpy(&result, &bits, 8);
  return result;
}

// Does the label depend on the scores? It is then the class of the largest (sign 1) or the smallest (-1) of them.
ENSADV_HD bool label_needs_scores(const LogitGradArgs& args) {
  return args.rule == Rule::predicted || args.rule == Rule::least_likely || !args.given;
}
ENSADV_HD int label_sign(const LogitGradArgs& args) { return args.rule == Rule::least_likely ? -1 : 1; }

// The label of sample b. `found`: the class of that extreme score.
ENSADV_HD int64_t choose_label(const LogitGradArgs& args, int64_t b, int32_t found) {
  const int64_t y = label_needs_scores(args) ? found : args.given[b];
  if (args.rule != Rule::random) return y;
  const uint32_t word = draw(read_key(args.key), 0, sample_id(args.index, b)).w[0];
  const int64_t other = int64_t((uint64_t(word) * uint64_t(args.classes - 1)) >> 32);
  return other + (other >= y);
}

// cw or dlr: the loss and its gradient by the scores. The gradient is zero except at the label, at the largest other
// score (where several tie they share it evenly, as in torch.amax) and, for dlr, at the first and third largest score.
template <class A>
struct Margin {
  A loss = 0, base = 0;  // base: 0, or NaN where the margin is NaN
  A own = 0, other = 0, extreme = 0;
  A rival = 0;  // the largest score except the label's
  int32_t y = 0, first = -1, third = -1;

  ENSADV_HD A grad(int32_t j, A score) const {
    A g = base + (j == y ? own : score == rival ? other : A(0));
    g += j == first ? extreme : A(0);
    return g - (j == third ? extreme : A(0));
  }
};

// The scores that a margin depends on. first, third: for dlr alone.
template <class A>
struct MarginScores {
  A own, rival;
  int32_t ties;  // how many classes except the label score `rival`
  A first = 0, third = 0;
};

template <class A>
ENSADV_HD Margin<A> margin_of(const LogitGradArgs& args, const MarginScores<A>& s, Margin<A> m) {
  const A margin = s.own - s.rival;
  m.rival = s.rival;
  if (args.loss == Loss::cw) {
    const A hinge = args.targeted ? A(args.kappa) - margin : margin + A(args.kappa);
    const A reached = hinge < A(0) ? A(0) : hinge;
    m.loss = args.targeted ? reached : -reached;
    m.own = hinge < A(0) ? A(0) : A(-1);  // at 0 the slope counts, as in torch.clamp
    m.base = hinge != hinge ? hinge : A(0);
  } else {
    const A range = s.first - s.third + A(1e-12), ratio = margin / range;
    m.loss = -ratio;
    m.own = A(-1) / range;
    m.extreme = ratio / range;
    m.base = ratio != ratio ? ratio : A(0);
  }
  m.other = s.ties > 0 ? -m.own / A(s.ties) : A(0);
  return m;
}

void logit_grad_cpu(const LogitGradArgs& args, int64_t begin, int64_t end);  // range: samples
int logit_grad_cuda(const LogitGradArgs& args, void* stream);

}  // namespace ensadv
