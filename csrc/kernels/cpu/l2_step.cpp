#include "../l2_step.h"

#include "reduce.h"

namespace ensadv {
namespace {

#define ENSADV_L2(A)                                                                                 \
  ENSADV_CLONES void squares(const A* grad, int n, double* terms) {                                  \
    for (int i = 0; i < n; ++i) {                                                                    \
      const double g = grad[i] != grad[i] ? 0.0 : double(grad[i]);                                   \
      terms[i] = g * g;                                                                              \
    }                                                                                                \
  }                                                                                                  \
  ENSADV_CLONES void displacements(const A* x, const A* grad, const A* center, int n, L2Sample<A> s, \
                                   double* terms) {                                                  \
    for (int i = 0; i < n; ++i) {                                                                    \
      const double d = displacement(s.moved(x[i], grad[i]), center[i]);                              \
      terms[i] = d * d;                                                                              \
    }                                                                                                \
  }
ENSADV_L2(float)
ENSADV_L2(double)
#undef ENSADV_L2

// `reach`: receives each element's reach if results are stored in fewer bits, else null.
#define ENSADV_L2_STEP(A, name, kBall)                                                                      \
  ENSADV_CLONES void name(const A* x, const A* grad, const A* center, A* v, A* reach, int n, L2Sample<A> s, \
                          Box<A> box) {                                                                     \
    const L2Step<A, kBall> f{box};                                                                          \
    if (reach)                                                                                              \
      ENSADV_INDEPENDENT for (int i = 0; i < n; ++i)                                                        \
        v[i] = finish(f(x[i], grad[i], center[i], s, reach + i), 0, 0, box);                                \
    else                                                                                                    \
      ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) v[i] = f(x[i], grad[i], center[i], s);                 \
  }
ENSADV_L2_STEP(float, step_free, false)
ENSADV_L2_STEP(float, step_ball, true)
ENSADV_L2_STEP(double, step_free, false)
ENSADV_L2_STEP(double, step_ball, true)
#undef ENSADV_L2_STEP

// Without a gradient the norm is 0, which is not usable, so that nothing moves. The loops are given x in place of grad.
template <class A>
L2Sample<A> sample_of(const L2StepArgs& args, int64_t sample, int64_t chunks) {
  return {value_at<A>(args.step, sample), args.grad.data ? sum_chunks(args.grad_sums, sample, chunks) : 0.0};
}

template <class A>
const A* load_grad_or(const L2StepArgs& args, int64_t i, int n, A* scratch, const A* x) {
  return args.grad.data ? load(args.grad, i, n, scratch) : x;
}

}  // namespace

void l2_grad_sums_cpu(const L2StepArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.out.dtype, [&](auto t) {
    using A = compute_t<decltype(t)>;
    A gs[kStrip];
    for_each_reduction_chunk(args.batch, args.grad_sums, begin, end, [&](int64_t, int64_t first, int64_t last) {
      return sum_chunk(first, last, [&](int64_t i, int n, double* terms) {
        squares(load(args.grad, i, n, gs), n, terms);
      });
    });
  });
}

void l2_delta_sums_cpu(const L2StepArgs& args, int64_t begin, int64_t end) {
  const int64_t chunks = chunks_of(args.batch.inner).count;
  with_dtype(args.out.dtype, [&](auto t) {
    using A = compute_t<decltype(t)>;
    A xs[kStrip], gs[kStrip], cs[kStrip];
    for_each_reduction_chunk(args.batch, args.delta_sums, begin, end, [&](int64_t n, int64_t first, int64_t last) {
      const L2Sample<A> s = sample_of<A>(args, n, chunks);
      return sum_chunk(first, last, [&](int64_t i, int count, double* terms) {
        const A* x = load(args.x, i, count, xs);
        displacements(x, load_grad_or(args, i, count, gs, x), load(args.center, i, count, cs), count, s, terms);
      });
    });
  });
}

void l2_step_cpu(const L2StepArgs& args, int64_t begin, int64_t end) {
  const int64_t chunks = chunks_of(args.batch.inner).count;
  with_dtype(args.out.dtype, [&](auto t) {
    using T = decltype(t);
    using A = compute_t<T>;
    const Box<T> box = make_box<T>(args.lo, args.hi);
    A xs[kStrip], gs[kStrip], cs[kStrip], vs[kStrip], reaches[kStrip];
    A* reach = kStored<T> ? reaches : nullptr;
    L2Sample<A> s(A(0), 0.0);
    int64_t known = -1;
    for_each_strip(args.batch, true, kStrip, begin, end, [&](int64_t i, int n, int64_t sample) {
      if (sample != known) {
        s = sample_of<A>(args, sample, chunks);
        if (args.center.data)
          s.shrink = shrink_factor(sum_chunks(args.delta_sums, sample, chunks), size_at<A>(args.eps, sample));
        known = sample;
      }
      const A* x = load(args.x, i, n, xs);
      const A* grad = load_grad_or(args, i, n, gs, x);
      const A* center = args.center.data ? load(args.center, i, n, cs) : x;
      T* out = static_cast<T*>(args.out.data) + i;
      A* v = computed_in(out, vs);
      if (args.center.data)
        step_ball(x, grad, center, v, reach, n, s, computed_box(box));
      else
        step_free(x, grad, center, v, reach, n, s, computed_box(box));
      if constexpr (kStored<T>) store(v, center, reaches, box, out, n);
    });
  });
}

}  // namespace ensadv
