#include "../momentum_step.h"

#include "reduce.h"

namespace ensadv {
namespace {

#define ENSADV_MOMENTUM(A)                                                            \
  ENSADV_CLONES void absolutes(const A* grad, int n, double* terms) {                 \
    for (int i = 0; i < n; ++i) terms[i] = double(absolute(grad[i]));                 \
  }                                                                                   \
  ENSADV_CLONES void accumulate(const A* grad, A* momentum, int n, A mean, A decay) { \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i)                                    \
      momentum[i] = next_momentum(momentum[i], grad[i], mean, decay);                 \
  }
ENSADV_MOMENTUM(float)
ENSADV_MOMENTUM(double)
#undef ENSADV_MOMENTUM

}  // namespace

void momentum_sums_cpu(const MomentumStepArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.step.out.dtype, [&](auto t) {
    using A = compute_t<decltype(t)>;
    A gs[kStrip];
    for_each_reduction_chunk(args.step.batch, args.scratch, begin, end, [&](int64_t, int64_t first, int64_t last) {
      return sum_chunk(first, last, [&](int64_t i, int n, double* terms) {
        absolutes(load(args.step.grad, i, n, gs), n, terms);
      });
    });
  });
}

void momentum_step_cpu(const MomentumStepArgs& args, int64_t begin, int64_t end) {
  const Batch& batch = args.step.batch;
  const Chunks chunks = chunks_of(batch.inner);
  SignStepArgs along = args.step;
  with_dtype(args.step.out.dtype, [&](auto t) {
    using A = compute_t<decltype(t)>;
    along.grad = {args.momentum, Traits<A>::dtype};
    A gs[kStrip];
    A mean = 0;
    int64_t known = -1;
    for_each_strip(batch, true, kStrip, begin, end, [&](int64_t i, int n, int64_t sample) {
      if (sample != known) {
        mean = A(sum_chunks(args.scratch, sample, chunks.count) / double(batch.inner));
        known = sample;
      }
      accumulate(load(args.step.grad, i, n, gs), static_cast<A*>(args.momentum) + i, n, mean, A(args.decay));
      sign_step_cpu(along, i, i + n);  // while the momentum is in the L1 cache
    });
  });
}

}  // namespace ensadv
