#include "../l2_step.h"
#include "reduce.cuh"

namespace ensadv {
namespace {

template <class A>
__device__ __forceinline__ L2Sample<A> l2_sample(const L2StepArgs& args, int64_t sample, int64_t chunks) {
  return {value_at<A>(args.step, sample), args.grad.data ? sum_chunks(args.grad_sums, sample, chunks) : 0.0};
}

template <int V, class A>
__device__ __forceinline__ void load_grad_or_zeros(const In& grad, int64_t i, int count, bool whole, A* dst) {
  if (grad.data) return load_grad<V>(grad, i, count, whole, dst);
#pragma unroll
  for (int j = 0; j < V; ++j) dst[j] = A(0);
}

template <class A>
__global__ void __launch_bounds__(kThreads) l2_grad_sums_kernel(L2StepArgs args, Chunks chunks, bool aligned) {
  sum_block(BlockChunk(args.batch, chunks), aligned, args.grad_sums,
            [&](int64_t i, int count, bool whole, double(&slots)[kSlotPack]) {
              A grad[kSlotPack];
              load_grad<kSlotPack>(args.grad, i, count, whole, grad);
#pragma unroll
              for (int j = 0; j < kSlotPack; ++j) {
                const double g = grad[j] != grad[j] ? 0.0 : double(grad[j]);
                slots[j] += g * g;
              }
            });
}

template <class TX>
__global__ void __launch_bounds__(kThreads) l2_delta_sums_kernel(L2StepArgs args, Chunks chunks, bool aligned) {
  using A = compute_t<TX>;
  const BlockChunk chunk(args.batch, chunks);
  const L2Sample<A> s = l2_sample<A>(args, chunk.sample, chunks.count);
  sum_block(chunk, aligned, args.delta_sums, [&](int64_t i, int count, bool whole, double(&slots)[kSlotPack]) {
    A x[kSlotPack], grad[kSlotPack], center[kSlotPack];
    load_pack<TX, kSlotPack>(args.x.data, i, count, whole, x);
    load_pack<TX, kSlotPack>(args.center.data, i, count, whole, center);
    load_grad_or_zeros<kSlotPack>(args.grad, i, count, whole, grad);
#pragma unroll
    for (int j = 0; j < kSlotPack; ++j) {
      const double d = j < count ? displacement(s.moved(x[j], grad[j]), center[j]) : 0.0;
      slots[j] += d * d;
    }
  });
}

template <class TX, class TO, bool kBall>
__global__ void __launch_bounds__(kThreads)
    l2_step_kernel(L2StepArgs args, L2Step<TO, kBall> f, Chunks chunks, bool aligned) {
  using A = compute_t<TO>;
  constexpr int V = kPack<TX, TO>;
  const BlockChunk chunk(args.batch, chunks);
  L2Sample<A> s = l2_sample<A>(args, chunk.sample, chunks.count);
  if (kBall)
    s.shrink = shrink_factor(sum_chunks(args.delta_sums, chunk.sample, chunks.count),
                             size_at<A>(args.eps, chunk.sample));
  for_each_pack_in<V>(chunk, aligned, [&](int64_t i, int count, bool whole) {
    A x[V], grad[V], center[V];
    load_pack<TX, V>(args.x.data, i, count, whole, x);
    if constexpr (kBall) load_pack<TX, V>(args.center.data, i, count, whole, center);
    load_grad_or_zeros<V>(args.grad, i, count, whole, grad);
    TO out[V];
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = f(x[j], grad[j], kBall ? center[j] : A(0), s);
    store_pack<TO, V>(args.out.data, i, count, whole, out);
  });
}

template <class TX, class TO, bool kBall>
int run(const L2StepArgs& args, const Chunks& chunks, bool aligned, void* stream) {
  const L2Step<TO, kBall> f{make_box<TO>(args.lo, args.hi)};
  return launch_chunks(l2_step_kernel<TX, TO, kBall>, args.batch, chunks, stream, args, f, chunks, aligned);
}

}  // namespace

int l2_step_cuda(const L2StepArgs& args, void* stream) {
  const Chunks chunks = chunks_of(args.batch.inner);
  const bool aligned = is_aligned(args.x.data) && is_aligned(args.grad.data) && is_aligned(args.center.data) &&
                       is_aligned(args.out.data);
  // Without a gradient any dtype that goes with x will do.
  const Dtype grad_dtype = args.grad.data ? args.grad.dtype : args.x.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  return with_step_dtypes(args.x.dtype, grad_dtype, args.out.dtype, [&](auto x, auto out) {
    using X = decltype(x);
    using O = decltype(out);
    int error = 0;
    if (args.grad.data)
      error = launch_chunks(l2_grad_sums_kernel<compute_t<O>>, args.batch, chunks, stream, args, chunks, aligned);
    if (!error && args.center.data)
      error = launch_chunks(l2_delta_sums_kernel<X>, args.batch, chunks, stream, args, chunks, aligned);
    if (error) return error;
    return args.center.data ? run<X, O, true>(args, chunks, aligned, stream)
                            : run<X, O, false>(args, chunks, aligned, stream);
  });
}

}  // namespace ensadv
