#include "../sign_step.h"

#include "loop.h"

namespace ensadv {
namespace {

#define ENSADV_SIGN_STEP(T)                                                                                   \
  ENSADV_CLONES void step_free(const compute_t<T>* x, const compute_t<T>* grad, T* out, int n,                \
                               compute_t<T> step, Box<T> box) {                                        \
    const SignStep<T, false> f{box};                                                                          \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) out[i] = f(x[i], grad[i], 0, step, 0);                     \
  }                                                                                                           \
  ENSADV_CLONES void step_ball(const compute_t<T>* x, const compute_t<T>* grad, const compute_t<T>* center,   \
                               T* out, int n, compute_t<T> step, compute_t<T> eps, Box<T> box) {       \
    const SignStep<T, true> f{box};                                                                           \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) out[i] = f(x[i], grad[i], center[i], step, eps);           \
  }
ENSADV_SIGN_STEP(float)
ENSADV_SIGN_STEP(double)
ENSADV_SIGN_STEP(half_t)
ENSADV_SIGN_STEP(bfloat_t)
ENSADV_SIGN_STEP(level_t)
#undef ENSADV_SIGN_STEP

}  // namespace

void sign_step_cpu(const SignStepArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.out.dtype, [&](auto t) {
    using T = decltype(t);
    using A = compute_t<T>;
    const Box<T> box = make_box<T>(args.lo, args.hi);
    A xs[kChunk], gs[kChunk], cs[kChunk];
    const bool by_sample = args.step.data || args.eps.data;
    for_each_chunk(args.batch, by_sample, kChunk, begin, end, [&](int64_t i, int n, int64_t sample) {
      const A* x = load(args.x, i, n, xs);
      const A* grad = load(args.grad, i, n, gs);
      T* out = static_cast<T*>(args.out.data) + i;
      const A step = at<A>(args.step, sample);
      if (args.center.data)
        step_ball(x, grad, load(args.center, i, n, cs), out, n, step, size_at<A>(args.eps, sample), box);
      else
        step_free(x, grad, out, n, step, box);
    });
  });
}

}  // namespace ensadv
