#include "../sign_step.h"
#include "loop.cuh"

namespace ensadv {
namespace {

template <class TX, class TG, class TO, bool kBall>
__global__ void __launch_bounds__(kThreads) sign_step_kernel(SignStepArgs args, SignStep<TO, kBall> f, bool aligned) {
  using A = compute_t<TO>;
  constexpr int V = kPack<TO>;
  const bool by_sample = args.step.data || args.eps.data;
  for_each_pack<V>(args.batch.numel, aligned, [&](int64_t i, int count, bool whole) {
    A x[V], center[V];
    compute_t<TG> grad[V];
    load_pack<TX, V>(args.x.data, i, count, whole, x);
    load_pack<TG, V>(args.grad.data, i, count, whole, grad);
    if constexpr (kBall) load_pack<TX, V>(args.center.data, i, count, whole, center);
    int64_t sample = by_sample ? sample_of(i, args.batch) : 0;
    int64_t left = by_sample ? (sample + 1) * args.batch.inner - i : V;  // elements of this sample still ahead
    A step = at<A>(args.step, sample), eps = size_at<A>(args.eps, sample);
    TO out[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (left == 0 && j < count) {
        left = args.batch.inner;
        ++sample;
        step = at<A>(args.step, sample);
        eps = size_at<A>(args.eps, sample);
      }
      --left;
      out[j] = f(x[j], A(grad[j]), kBall ? center[j] : A(0), step, eps);
    }
    store_pack<TO, V>(args.out.data, i, count, whole, out);
  });
}

template <class TX, class TG, class TO, bool kBall>
int run(const SignStepArgs& args, void* stream) {
  const bool aligned = is_aligned(args.x.data) && is_aligned(args.grad.data) && is_aligned(args.center.data) &&
                       is_aligned(args.out.data);
  unsigned grid = 0;
  const cudaError_t error = grid_for(args.batch.numel, kPack<TO>, &grid);
  if (error != cudaSuccess) return int(error);
  const SignStep<TO, kBall> f{make_box<TO>(args.lo, args.hi)};
  sign_step_kernel<TX, TG, TO, kBall>
      <<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, f, aligned);
  return int(cudaGetLastError());
}

template <class TX, class TG, class TO>
int with_ball(const SignStepArgs& args, void* stream) {
  return args.center.data ? run<TX, TG, TO, true>(args, stream) : run<TX, TG, TO, false>(args, stream);
}

template <class TX, class TO>
int with_grad(const SignStepArgs& args, void* stream) {
  switch (args.grad.dtype) {
    case Dtype::f32: return with_ball<TX, float, TO>(args, stream);
    case Dtype::f16: return with_ball<TX, half_t, TO>(args, stream);
    case Dtype::bf16: return with_ball<TX, bfloat_t, TO>(args, stream);
    default: return int(cudaErrorInvalidValue);
  }
}

}  // namespace

int sign_step_cuda(const SignStepArgs& args, void* stream) {
  const Dtype x = args.x.dtype, out = args.out.dtype;
  if (x == Dtype::f64)
    return args.grad.dtype == x && out == x ? with_ball<double, double, double>(args, stream)
                                            : int(cudaErrorInvalidValue);
  if (x == Dtype::f32 && out == Dtype::f32) return with_grad<float, float>(args, stream);
  if (x == Dtype::f32 && out == Dtype::f16) return with_grad<float, half_t>(args, stream);
  if (x == Dtype::f32 && out == Dtype::bf16) return with_grad<float, bfloat_t>(args, stream);
  if (x == Dtype::f16 && out == x) return with_grad<half_t, half_t>(args, stream);
  if (x == Dtype::bf16 && out == x) return with_grad<bfloat_t, bfloat_t>(args, stream);
  return int(cudaErrorInvalidValue);
}

}  // namespace ensadv
