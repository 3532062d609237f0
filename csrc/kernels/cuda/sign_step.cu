#include "../sign_step.h"
#include "loop.cuh"

namespace ensadv {
namespace {

// Two blocks per multiprocessor: without this bound ptxas spills a word to fit three.
template <class TX, class TO, bool kBall>
__global__ void __launch_bounds__(kThreads, 2)
    sign_step_kernel(SignStepArgs args, SignStep<TO, kBall> f, bool aligned) {
  using A = compute_t<TO>;
  constexpr int V = kPack<TX, TO>;
  const bool by_sample = args.step.data || args.eps.data;
  for_each_pack<V>(args.batch.numel, aligned, [&](int64_t i, int count, bool whole) {
    A x[V], grad[V], center[V];
    load_pack<TX, V>(args.x.data, i, count, whole, x);
    if constexpr (kBall) load_pack<TX, V>(args.center.data, i, count, whole, center);
    load_grad<V>(args.grad, i, count, whole, grad);
    int64_t sample = by_sample ? sample_of(i, args.batch) : 0;
    int64_t left = by_sample ? (sample + 1) * args.batch.inner - i : V;  // elements of this sample from i on
    A step = value_at<A>(args.step, sample), eps = size_at<A>(args.eps, sample);
    TO out[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (left == 0 && j < count) {
        left = args.batch.inner;
        ++sample;
        step = value_at<A>(args.step, sample);
        eps = size_at<A>(args.eps, sample);
      }
      --left;
      out[j] = f(x[j], grad[j], kBall ? center[j] : A(0), step, eps);
    }
    store_pack<TO, V>(args.out.data, i, count, whole, out);
  });
}

template <class TX, class TO, bool kBall>
int run(const SignStepArgs& args, void* stream) {
  const bool aligned = is_aligned(args.x.data) && is_aligned(args.grad.data) && is_aligned(args.center.data) &&
                       is_aligned(args.out.data);
  const SignStep<TO, kBall> f{make_box<TO>(args.lo, args.hi)};
  return launch<kPack<TX, TO>>(sign_step_kernel<TX, TO, kBall>, args.batch.numel, stream, args, f, aligned);
}

}  // namespace

int sign_step_cuda(const SignStepArgs& args, void* stream) {
  return with_step_dtypes(args.x.dtype, args.grad.dtype, args.out.dtype, [&](auto x, auto out) {
    using X = decltype(x);
    using O = decltype(out);
    return args.center.data ? run<X, O, true>(args, stream) : run<X, O, false>(args, stream);
  });
}

}  // namespace ensadv
