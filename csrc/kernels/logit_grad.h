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
// 2 r P(r^2) / (Q(r^2) - r P(r^2)), which is e^r - 1 for |r| <= ln(2) / 2: Cephes' rational.
ENSADV_HD double exp_less_one(double r) {
  const double s = r * r;
  const double p = r * ((1.26177193074810590878e-4 * s + 3.02994407707441961300e-2) * s + 9.99999999999999999910e-1);
  double q = (3.00198505138664455042e-6 * s + 2.52448340349684104192e-3) * s + 2.27265548208155028766e-1;
  q = q * s + 2.0;
  return 2.0 * (p / (q - p));
}
ENSADV_HD double exp_nonpositive(double x) {
  x = x < -746.0 ? -746.0 : x;                                      // e^-746 rounds to 0
  const double shifted = x * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52 rounds to an integer
  const double n = shifted - 6755399441055744.0;
  const double r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  const double p = exp_less_one(r) + 1.0;
  const int64_t k = double_bits(shifted) - 0x4338000000000000;      // n as an integer
  const int64_t half = k >> 1;
  return p * bits_double((half + 1023) << 52) * bits_double((k - half + 1023) << 52);
}

// 1 - e^-d for d >= 0 without cancellation; NaN stays NaN.
ENSADV_HD float one_less_exp(float d) {
  const float r = -d;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return d < 0.34f ? d - p * (r * r) : 1.0f - exp_nonpositive(r);
}
ENSADV_HD double one_less_exp(double d) { return d < 0.34 ? -exp_less_one(-d) : 1.0 - exp_nonpositive(-d); }

// e^(a - max) - e^(b - max), where a and b may lie close together.
template <class A>
ENSADV_HD A exp_gap(A a, A b, A max) {
  if (a == b) return A(0);  // also where both are -inf
  return a < b ? -(exp_nonpositive(b - max) * one_less_exp(b - a)) : exp_nonpositive(a - max) * one_less_exp(a - b);
}

// log(1 + x) for x > -1, and log(x), in plain arithmetic, so that CPU and CUDA agree: fdlibm's series in
// s = f / (2 + f), where 1 + x = 2^k (1 + f). Infinity and NaN stay, log(0) is -inf.
ENSADV_HD double log_one_plus(double x) {
  const double u = 1.0 + x;
  if (!(u > 0.0) || u > 1.7976931348623157e308) return u == 0.0 ? -INFINITY : u < 0.0 ? NAN : u;
  const double lost = u > 2.0 ? 1.0 - (u - x) : x - (u - 1.0);       // of x, when it was added to 1
  const int64_t bits = double_bits(u);
  const int64_t k = (bits - 0x3fe6a09e667f3bcd) >> 52;               // u / 2^k lies within sqrt(1/2) and sqrt(2)
  const double f = k == 0 ? x : bits_double(bits - (k << 52)) - 1.0;
  const double more = k == 0 ? 0.0 : lost / u;
  const double s = f / (2.0 + f), z = s * s, half = 0.5 * f * f;
  const double series = z * (6.666666666666735130e-01 + z * (3.999999999940941908e-01 + z * (2.857142874366239149e-01 +
                        z * (2.222219843214978396e-01 + z * (1.818357216161805012e-01 + z * (1.531383769920937332e-01 +
                        z * 1.479819860511658591e-01))))));
  const double n = double(k);
  const double low = s * (half + series) + (n * 1.90821492927058770002e-10 + more);
  return n * 6.93147180369123816490e-01 - ((half - low) - f);
}
ENSADV_HD float log_one_plus(float x) { return float(log_one_plus(double(x))); }
ENSADV_HD double log_of(double x) { return log_one_plus(x - 1.0); }
ENSADV_HD float log_of(float x) { return float(log_one_plus(double(x) - 1.0)); }

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

// A row is summed in an order that its length alone fixes, the same on the CPU and on a GPU: in packs of kRowPack
// entries, each folded by halves; pack i goes to slot i % row_threads, which sums its packs in turn; slots are folded
// by halves within each 32, and then those results.
constexpr int kMostRowThreads = 512;
template <class A>
constexpr int kRowPack = 16 / int(sizeof(A)) * (sizeof(A) == 4 ? 2 : 1);  // one 16-byte word of float64 or 16 bits

template <class A>
ENSADV_HD int row_threads(int32_t classes) {
  const int64_t packs = (int64_t(classes) + kRowPack<A> - 1) / kRowPack<A>;
  return packs < kMostRowThreads ? int((packs + 31) / 32 * 32) : kMostRowThreads;
}

ENSADV_HD float fold_pack(const float* v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
ENSADV_HD double fold_pack(const double* v) { return v[0] + v[1]; }

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
  ENSADV_HD A log_probability(A own) const { return (own - max) - log_one_plus(rest) + zero(); }
};

// log(sum_k w_k p_k) of one class, from the members' log-probabilities. Each goes to `find_max`, then each to `add`.
template <class A>
struct LogMean {
  A max = -A(INFINITY), sum = 0;

  ENSADV_HD void find_max(A weight, A logp) { max = weight > A(0) && logp > max ? logp : max; }
  ENSADV_HD void add(A weight, A logp) { sum += part(weight, logp); }
  ENSADV_HD A part(A weight, A logp) const { return weight > A(0) ? weight * exp_nonpositive(logp - max) : A(0); }
  ENSADV_HD A value() const { return max + log_of(sum); }
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
//
// Through a softmax q it becomes q_j (g_j - sum_i q_i g_i). Where a member is confident, that is the difference of
// nearly equal numbers at the class it is confident of; so g is taken less its value there, `shift`, which changes
// nothing else.
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

// What a margin depends on. Of mixed probabilities the differences are not taken from the scores: see exp_gap.
template <class A>
struct MarginScores {
  A rival;
  int32_t ties;  // how many classes except the label score `rival`
  A margin;      // the label's score less `rival`
  A range = 0;   // for dlr: the first score less the third
};

template <class A>
ENSADV_HD Margin<A> margin_of(const LogitGradArgs& args, const MarginScores<A>& s, Margin<A> m) {
  const A margin = s.margin;
  m.rival = s.rival;
  if (args.loss == Loss::cw) {
    const A hinge = args.targeted ? A(args.kappa) - margin : margin + A(args.kappa);
    const A reached = hinge < A(0) ? A(0) : hinge;
    m.loss = args.targeted ? reached : -reached;
    m.own = hinge < A(0) ? A(0) : A(-1);  // at 0 the slope counts, as in torch.clamp
    m.base = hinge != hinge ? hinge : A(0);
  } else {
    const A range = s.range + A(1e-12), ratio = margin / range;
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
