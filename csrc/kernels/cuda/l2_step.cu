#include "../l2_step.h"
#include "reduce.cuh"

namespace ensadv {
namespace {

template <class A>
__device__ __forceinline__ L2Sample<A> l2_sample(const L2StepArgs& args, int64_t sample, int64_t chunks) {
  return {at<A>(args.step, sample), args.grad.data ? sum_chunks(args.grad_sums, sample, chunks) : 0.0};
}

// x, the gradient (x where there is none: it is not read then) and the center of one pack.
template <class TX, class TG, class A, int V, bool kBall>
__device__ __forceinline__ void load_l2(const L2StepArgs& args, int64_t i, int count, bool whole, A* x, A* grad,
                                        A* center) {
  load_pack<TX, V>(args.x.data, i, count, whole, x);
  if (args.grad.data) {
    compute_t<TG> g[V];
    load_pack<TG, V>(args.grad.data, i, count, whole, g);
#pragma unroll
    for (int j = 0; j < V; ++j) grad[j] = A(g[j]);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) grad[j] = A(0);
  }
  if constexpr (kBall) load_pack<TX, V>(args.center.data, i, count, whole, center);
}

template <class TG>
__global__ void __launch_bounds__(kThreads) l2_grad_sums_kernel(L2StepArgs args, Chunks chunks, bool aligned) {
  sum_block(BlockChunk(args.batch, chunks), aligned, args.grad_sums,
            [&](int64_t i, int count, bool whole, double(&slots)[kSlotPack]) {
              compute_t<TG> grad[kSlotPack];
              load_pack<TG, kSlotPack>(args.grad.data, i, count, whole, grad);
#pragma unroll
              for (int j = 0; j < kSlotPack; ++j) {
                const double g = grad[j] != grad[j] ? 0.0 : double(grad[j]);
                slots[j] += g * g;
              }
            });
}

template <class TX, class TG, class A>
__global__ void __launch_bounds__(kThreads) l2_delta_sums_kernel(L2StepArgs args, Chunks chunks, bool aligned) {
  const BlockChunk chunk(args.batch, chunks);
  const L2Sample<A> s = l2_sample<A>(args, chunk.sample, chunks.count);
  sum_block(chunk, aligned && sizeof(TX) > 1, args.delta_sums,  // eight bytes of uint8 are no 16-byte word
            [&](int64_t i, int count, bool whole, double(&slots)[kSlotPack]) {
              constexpr int V = sizeof(TX) == 1 ? 16 : kSlotPack;
              A x[V], grad[V], center[V];
              load_l2<TX, TG, A, V, true>(args, i, count, whole, x, grad, center);
#pragma unroll
              for (int j = 0; j < kSlotPack; ++j) {
                const double d = j < count ? double(s.moved(x[j], grad[j])) - double(center[j]) : 0.0;
                slots[j] += d * d;
              }
            });
}

template <class TX, class TG, class TO, bool kBall>
__global__ void __launch_bounds__(kThreads)
    l2_step_kernel(L2StepArgs args, L2Step<TO, kBall> f, Chunks chunks, bool aligned) {
  using A = compute_t<TO>;
  constexpr int V = kPack<TX, TG, TO>;
  const BlockChunk chunk(args.batch, chunks);
  L2Sample<A> s = l2_sample<A>(args, chunk.sample, chunks.count);
  if (kBall)
    s.shrink = shrink_factor(sum_chunks(args.delta_sums, chunk.sample, chunks.count),
                             size_at<A>(args.eps, chunk.sample));
  for_each_pack_in<V>(chunk, aligned, [&](int64_t i, int count, bool whole) {
    A x[V], grad[V], center[V];
    load_l2<TX, TG, A, V, kBall>(args, i, count, whole, x, grad, center);
    TO out[V];
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = f(x[j], grad[j], kBall ? center[j] : A(0), s);
    store_pack<TO, V>(args.out.data, i, count, whole, out);
  });
}

template <class TX, class TG, class TO, bool kBall>
int run(const L2StepArgs& args, const Chunks& chunks, bool aligned, void* stream) {
  const L2Step<TO, kBall> f{make_box<TO>(args.lo, args.hi)};
  return launch_chunks(l2_step_kernel<TX, TG, TO, kBall>, args.batch, chunks, stream, args, f, chunks, aligned);
}

}  // namespace

int l2_step_cuda(const L2StepArgs& args, void* stream) {
  const Chunks chunks = chunks_of(args.batch.inner);
  const bool aligned = is_aligned(args.x.data) && is_aligned(args.grad.data) && is_aligned(args.center.data) &&
                       is_aligned(args.out.data);
  // Without a gradient its dtype is moot: any that goes with x.
  const Dtype grad_dtype = args.grad.data ? args.grad.dtype : args.x.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  return with_step_dtypes(args.x.dtype, grad_dtype, args.out.dtype, [&](auto x, auto grad, auto out) {
    using X = decltype(x);
    using G = decltype(grad);
    using O = decltype(out);
    int error = 0;
    if (args.grad.data)
      error = launch_chunks(l2_grad_sums_kernel<G>, args.batch, chunks, stream, args, chunks, aligned);
    if (!error && args.center.data)
      error = launch_chunks(l2_delta_sums_kernel<X, G, compute_t<O>>, args.batch, chunks, stream, args, chunks,
                            aligned);
    if (error) return error;
    return args.center.data ? run<X, G, O, true>(args, chunks, aligned, stream)
                            : run<X, G, O, false>(args, chunks, aligned, stream);
  });
}

}  // namespace ensadv
