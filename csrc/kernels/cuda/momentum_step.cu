#include "../momentum_step.h"
#include "reduce.cuh"

namespace ensadv {
namespace {

template <class A>
__global__ void __launch_bounds__(kThreads) momentum_sums_kernel(MomentumStepArgs args, Chunks chunks, bool aligned) {
  sum_block(BlockChunk(args.step.batch, chunks), aligned, args.scratch,
            [&](int64_t i, int count, bool whole, double(&slots)[kSlotPack]) {
              A grad[kSlotPack];
              load_grad<kSlotPack>(args.step.grad, i, count, whole, grad);
#pragma unroll
              for (int j = 0; j < kSlotPack; ++j) slots[j] += double(absolute(grad[j]));
            });
}

// Two blocks per multiprocessor: without this bound ptxas spills a word to fit five.
template <class TX, class TO, bool kBall>
__global__ void __launch_bounds__(kThreads, 2)
    momentum_step_kernel(MomentumStepArgs args, SignStep<TO, kBall> f, Chunks chunks, bool aligned) {
  using A = compute_t<TO>;
  constexpr int V = kPack<TX, TO>;
  const BlockChunk chunk(args.step.batch, chunks);
  const A mean = A(sum_chunks(args.scratch, chunk.sample, chunks.count) / double(args.step.batch.inner));
  const A step = value_at<A>(args.step.step, chunk.sample), eps = size_at<A>(args.step.eps, chunk.sample);
  for_each_pack_in<V>(chunk, aligned, [&](int64_t i, int count, bool whole) {
    A x[V], grad[V], center[V], momentum[V];
    load_pack<TX, V>(args.step.x.data, i, count, whole, x);
    load_pack<A, V>(args.momentum, i, count, whole, momentum);
    if constexpr (kBall) load_pack<TX, V>(args.step.center.data, i, count, whole, center);
    load_grad<V>(args.step.grad, i, count, whole, grad);
    TO out[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      momentum[j] = next_momentum(momentum[j], grad[j], mean, A(args.decay));
      out[j] = f(x[j], momentum[j], kBall ? center[j] : A(0), step, eps);
    }
    store_pack<A, V>(args.momentum, i, count, whole, momentum);
    store_pack<TO, V>(args.step.out.data, i, count, whole, out);
  });
}

template <class TX, class TO, bool kBall>
int run(const MomentumStepArgs& args, const Chunks& chunks, bool aligned, void* stream) {
  const SignStep<TO, kBall> f{make_box<TO>(args.step.lo, args.step.hi)};
  return launch_chunks(momentum_step_kernel<TX, TO, kBall>, args.step.batch, chunks, stream, args, f, chunks,
                       aligned);
}

}  // namespace

int momentum_step_cuda(const MomentumStepArgs& args, void* stream) {
  const SignStepArgs& s = args.step;
  const Chunks chunks = chunks_of(s.batch.inner);
  const bool aligned = is_aligned(s.x.data) && is_aligned(s.grad.data) && is_aligned(s.center.data) &&
                       is_aligned(s.out.data) && is_aligned(args.momentum);
  return with_step_dtypes(s.x.dtype, s.grad.dtype, s.out.dtype, [&](auto x, auto out) {
    using X = decltype(x);
    using O = decltype(out);
    const int error = launch_chunks(momentum_sums_kernel<compute_t<O>>, s.batch, chunks, stream, args, chunks, aligned);
    if (error) return error;
    return s.center.data ? run<X, O, true>(args, chunks, aligned, stream)
                         : run<X, O, false>(args, chunks, aligned, stream);
  });
}

}  // namespace ensadv
