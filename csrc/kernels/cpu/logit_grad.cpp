#include "../logit_grad.h"

#include <limits>
#include <type_traits>
#include <vector>

#include "loop.h"

namespace ensadv {
namespace {

constexpr int kPartialSums = 32;  // in a sum, independent of each other: one vector or a few in every instruction set

// Loops over one row. skip0, skip1: entries to leave out, -1 for none.
#define ENSADV_ROW_LOOPS(A)                                                                             \
  ENSADV_CLONES ordinal_t<A> best_ordinal(const A* v, int n, A sign, int skip0, int skip1) {            \
    ordinal_t<A> best = kNoOrdinal<A>;                                                                  \
    for (int j = 0; j < n; ++j) {                                                                       \
      const ordinal_t<A> ordinal = ordinal_of(v[j] * sign);                                             \
      const ordinal_t<A> skip = -ordinal_t<A>((j == skip0) | (j == skip1)); /* all ones or none */      \
      best = std::max(best, (ordinal & ~skip) | (kNoOrdinal<A> & skip));                                \
    }                                                                                                   \
    return best;                                                                                        \
  }                                                                                                     \
  ENSADV_CLONES int first_with(const A* v, int n, A sign, int skip0, int skip1, ordinal_t<A> ordinal) { \
    int first = n;                                                                                      \
    for (int j = 0; j < n; ++j) {                                                                       \
      const bool hit = (ordinal_of(v[j] * sign) == ordinal) & (j != skip0) & (j != skip1);              \
      const int found = hit ? j : n;                                                                    \
      first = found < first ? found : first;                                                            \
    }                                                                                                   \
    return first;                                                                                       \
  }                                                                                                     \
  ENSADV_CLONES int count_of(const A* v, int n, A value, int skip) {                                    \
    int count = 0;                                                                                      \
    for (int j = 0; j < n; ++j) count += (v[j] == value) & (j != skip);                                 \
    return count;                                                                                       \
  }                                                                                                     \
  ENSADV_CLONES A sum_of(const A* v, const A* w, int n) { /* of v, or of v * w unless w is null */      \
    A lanes[kPartialSums] = {};                                                                         \
    int64_t j = 0; /* not int, which wraps under -fwrapv */                                             \
    if (w)                                                                                              \
      for (; j + kPartialSums <= n; j += kPartialSums)                                                  \
        for (int64_t l = 0; l < kPartialSums; ++l) lanes[l] += v[j + l] * w[j + l];                     \
    else                                                                                                \
      for (; j + kPartialSums <= n; j += kPartialSums)                                                  \
        for (int64_t l = 0; l < kPartialSums; ++l) lanes[l] += v[j + l];                                \
    for (int64_t l = 0; j < n; ++j, ++l) lanes[l] += w ? v[j] * w[j] : v[j];                            \
    for (int half = kPartialSums / 2; half; half /= 2)                                                  \
      for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];                                   \
    return lanes[0];                                                                                    \
  }                                                                                                     \
  ENSADV_CLONES void exponentials(const A* v, int n, A max, A* out) {                                   \
    ENSADV_INDEPENDENT for (int j = 0; j < n; ++j) out[j] = exp_nonpositive(v[j] - max);                \
  }                                                                                                     \
  ENSADV_CLONES void add_scaled(const A* v, int n, A weight, A* out) {                                  \
    ENSADV_INDEPENDENT for (int j = 0; j < n; ++j) out[j] += v[j] * weight;                             \
  }                                                                                                     \
  ENSADV_CLONES void margin_grad(const A* v, int n, const Margin<A>& m, A* out) {                       \
    ENSADV_INDEPENDENT for (int j = 0; j < n; ++j) out[j] = m.grad(j, v[j]);                            \
  }                                                                                                     \
  ENSADV_CLONES void through_softmax(const A* e, const A* g, int n, A mean, A* out) {                   \
    ENSADV_INDEPENDENT for (int j = 0; j < n; ++j) out[j] = e[j] * (g[j] - mean);                       \
  }
ENSADV_ROW_LOOPS(float)
ENSADV_ROW_LOOPS(double)
#undef ENSADV_ROW_LOOPS

#define ENSADV_STORE(T)                                                                 \
  ENSADV_CLONES void store(const compute_t<T>* v, int n, compute_t<T> weight, T* out) { \
    ENSADV_INDEPENDENT for (int j = 0; j < n; ++j) out[j] = round_to<T>(v[j] * weight); \
  }
ENSADV_STORE(float)
ENSADV_STORE(double)
ENSADV_STORE(half_t)
ENSADV_STORE(bfloat_t)
#undef ENSADV_STORE

template <class A>
int best_of(const A* v, int n, A sign = 1, int skip0 = -1, int skip1 = -1) {
  return first_with(v, n, sign, skip0, skip1, best_ordinal(v, n, sign, skip0, skip1));
}

// Computes the loss and the gradient of one sample after another. rows_ holds rows of `classes` numbers: the
// exponentials of each member, a member's converted logits, the scores, and a gradient.
template <class T>
class Sample {
  using A = compute_t<T>;

 public:
  explicit Sample(const LogitGradArgs& args)
      : args_(args), n_(args.classes), rows_(size_t(args.members + 3) * size_t(args.classes)),
        softmax_(size_t(args.members)) {}

  void run(int64_t b) {
    b_ = b;
    const bool single = args_.fuse == Fuse::logits;
    const A* scores = single ? fused_logits() : fused_probabilities();
    const int64_t label =
        choose_label(args_, b, label_needs_scores(args_) ? best_of(scores, n_, A(label_sign(args_))) : 0);
    valid_ = label >= 0 && label < n_;
    y_ = int(label < 0 ? 0 : label >= n_ ? n_ - 1 : label);
    scale_ = 1;
    A loss;
    if (args_.loss == Loss::ce)
      loss = single ? entropy_of_logits(scores) : entropy_of_members(scores);
    else
      loss = single ? margin_of_logits(scores) : args_.fuse == Fuse::probs ? margin_of_probabilities(scores)
                                                                           : margins_of_members();
    args_.labels[b] = label;
    static_cast<A*>(args_.losses)[b] = valid_ ? loss : std::numeric_limits<A>::quiet_NaN();
    static_cast<A*>(args_.scales)[b] = scale_;
  }

 private:
  A* row(int64_t k) { return rows_.data() + k * n_; }
  A* scratch() { return row(args_.members); }
  A* scores() { return row(args_.members + 1); }
  A* gradient() { return row(args_.members + 2); }
  A weight(int64_t k) const { return weight_of<A>(args_, k); }
  int64_t at(int64_t k) const { return (k * args_.batch + b_) * n_; }

  // Member k's logits: memory itself, or scratch() after conversion.
  const A* logits(int64_t k) {
    if constexpr (sizeof(T) != 2) return static_cast<const A*>(args_.logits.data) + at(k);
    for (int j = 0; j < n_; j += kStrip) load(args_.logits, at(k) + j, std::min(kStrip, n_ - j), scratch() + j);
    return scratch();
  }
  A logit(int64_t k, int j) const { return to_compute(static_cast<const T*>(args_.logits.data)[at(k) + j]); }

  const A* fused_logits() {
    if (args_.members == 1 && !args_.weights) return logits(0);
    std::fill_n(scores(), n_, A(0));
    for (int64_t k = 0; k < args_.members; ++k) add_scaled(logits(k), n_, weight(k), scores());
    return scores();
  }

  const A* fused_probabilities() {
    std::fill_n(scores(), n_, A(0));
    for (int64_t k = 0; k < args_.members; ++k) {
      softmax_[size_t(k)] = softmax(logits(k), row(k));
      add_scaled(row(k), n_, weight(k) / softmax_[size_t(k)].total(), scores());
    }
    return scores();
  }

  Softmax<A> softmax(const A* z, A* e) const {
    Softmax<A> s;
    s.top = best_of(z, n_);
    s.max = z[s.top];
    exponentials(z, n_, s.max, e);
    const A one = e[s.top];
    e[s.top] = 0;
    s.rest = sum_of(e, static_cast<const A*>(nullptr), n_);
    s.second = from_ordinal(best_ordinal(e, n_, A(1), s.top, -1));
    e[s.top] = one;
    return s;
  }

  void write(int64_t k, const A* v, A weight) { store(v, n_, weight, static_cast<T*>(args_.grad.data) + at(k)); }

  // Writes weight * scale * (p - onehot(y)), from the exponentials e of a softmax.
  void write_entropy(int64_t k, const A* e, const Softmax<A>& s, A own, A weight) {
    const A r = valid_ ? weight * (scale_ / s.total()) : A(0);
    write(k, e, r);
    static_cast<T*>(args_.grad.data)[at(k) + y_] = round_to<T>(-s.sum_except(y_, own) * r);
  }

  A entropy_of_logits(const A* z) {
    const Softmax<A> s = softmax(z, row(0));
    if (args_.rescale) scale_ = lift(s.largest_except(y_));
    for (int64_t k = 0; k < args_.members; ++k) write_entropy(k, row(0), s, z[y_], weight(k));
    return -s.log_probability(z[y_]);
  }

  A entropy_of_members(const A* p) {
    const Mixture<A> mixed(args_, [&](int64_t k) { return log_probability(k); });
    if (args_.rescale) scale_ = lift(from_ordinal(best_ordinal(p, n_, A(1), y_, -1)) / mixed.total);
    const bool probs = args_.fuse == Fuse::probs;
    for (int64_t k = 0; k < args_.members; ++k)
      write_entropy(k, row(k), softmax_[size_t(k)], logit(k, y_),
                    probs ? mixed.mean.part(weight(k), log_probability(k)) / mixed.mean.sum : weight(k));
    return probs ? -mixed.mean.value() : mixed.loss;
  }
  A log_probability(int64_t k) const { return softmax_[size_t(k)].log_probability(logit(k, y_)); }

  Margin<A> margin(const A* v) const {
    Margin<A> m;
    if (!valid_) return m;
    MarginScores<A> s{v[y_], -std::numeric_limits<A>::infinity(), 0};
    if (n_ > 1) {
      s.rival = v[best_of(v, n_, A(1), y_)];
      s.ties = count_of(v, n_, s.rival, y_);
    }
    m.y = y_;
    if (args_.loss == Loss::dlr) {
      m.first = best_of(v, n_);
      const int second = best_of(v, n_, A(1), m.first);
      m.third = best_of(v, n_, A(1), m.first, second);
      s.first = v[m.first];
      s.third = v[m.third];
    }
    return margin_of(args_, s, m);
  }

  A margin_of_logits(const A* z) {
    const Margin<A> m = margin(z);
    margin_grad(z, n_, m, gradient());
    for (int64_t k = 0; k < args_.members; ++k) write(k, gradient(), weight(k));
    return m.loss;
  }

  A margin_of_probabilities(const A* p) {
    const Margin<A> m = margin(p);
    margin_grad(p, n_, m, gradient());
    for (int64_t k = 0; k < args_.members; ++k) {
      const A total = softmax_[size_t(k)].total();
      through_softmax(row(k), gradient(), n_, sum_of(row(k), gradient(), n_) / total, scratch());
      write(k, scratch(), weight(k) / total);
    }
    return m.loss;
  }

  A margins_of_members() {
    A loss = 0;
    for (int64_t k = 0; k < args_.members; ++k) {
      const A* z = logits(k);
      const Margin<A> m = margin(z);
      margin_grad(z, n_, m, gradient());
      write(k, gradient(), weight(k));
      loss += weight(k) * m.loss;
    }
    return loss;
  }

  const LogitGradArgs& args_;
  const int n_;
  std::vector<A> rows_;
  std::vector<Softmax<A>> softmax_;
  int64_t b_ = 0;
  int y_ = 0;
  bool valid_ = true;
  A scale_ = 1;
};

}  // namespace

void logit_grad_cpu(const LogitGradArgs& args, int64_t begin, int64_t end) {
  if (begin >= end) return;
  with_dtype(args.logits.dtype, [&](auto t) {
    if constexpr (!std::is_same_v<decltype(t), level_t>) {
      Sample<decltype(t)> sample(args);
      for (int64_t b = begin; b < end; ++b) sample.run(b);
    }
  });
}

}  // namespace ensadv
