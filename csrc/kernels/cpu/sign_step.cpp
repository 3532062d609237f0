#include "../sign_step.h"

#include "loop.h"

namespace ensadv {
namespace {

#define ENSADV_SIGN_STEP(A)                                                                            \
  ENSADV_CLONES void step_free(const A* x, const A* grad, A* v, int n, A step, Box<A> box) {           \
    const SignStep<A, false> f{box};                                                                   \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) v[i] = f(x[i], grad[i], 0, step, 0);                \
  }                                                                                                    \
  ENSADV_CLONES void step_ball(const A* x, const A* grad, const A* center, A* v, int n, A step, A eps, \
                               Box<A> box) {                                                           \
    const SignStep<A, true> f{box};                                                                    \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) v[i] = f(x[i], grad[i], center[i], step, eps);      \
  }
ENSADV_SIGN_STEP(float)
ENSADV_SIGN_STEP(double)
#undef ENSADV_SIGN_STEP

}  // namespace

void sign_step_cpu(const SignStepArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.out.dtype, [&](auto t) {
    using T = decltype(t);
    using A = compute_t<T>;
    const Box<T> box = make_box<T>(args.lo, args.hi);
    A xs[kStrip], gs[kStrip], cs[kStrip], vs[kStrip];
    const bool by_sample = args.step.data || args.eps.data;
    for_each_strip(args.batch, by_sample, kStrip, begin, end, [&](int64_t i, int n, int64_t sample) {
      const A* x = load(args.x, i, n, xs);
      const A* grad = load(args.grad, i, n, gs);
      const A* center = args.center.data ? load(args.center, i, n, cs) : x;
      const A step = value_at<A>(args.step, sample);
      const A eps = args.center.data ? size_at<A>(args.eps, sample) : step < A(0) ? -step : step;
      T* out = static_cast<T*>(args.out.data) + i;
      A* v = computed_in(out, vs);
      if (args.center.data)
        step_ball(x, grad, center, v, n, step, eps, computed_box(box));
      else
        step_free(x, grad, v, n, step, computed_box(box));
      if constexpr (kStored<T>) store(v, center, eps, box, out, n);
    });
  });
}

}  // namespace ensadv
