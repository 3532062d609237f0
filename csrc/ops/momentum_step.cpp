#include "../kernels/momentum_step.h"

#include "step.h"

namespace ensadv::ops {
namespace {

void momentum_step(const Tensor x, const Tensor grad, const Tensor momentum, const std::optional<Tensor> center,
                   const std::optional<Tensor> step_n, const std::optional<Tensor> eps_n, double decay, double step,
                   double eps, double lo, double hi, const Tensor scratch, const Tensor out) {
  constexpr const char* op = "momentum_step";
  const Sizes sizes{step_n, eps_n, step, eps, lo, hi};
  MomentumStepArgs args{step_args<SignStepArgs>(op, x, &grad, pointer_to(center), sizes, out, &momentum),
                        momentum.data_ptr(), nullptr, decay};
  const SignStepArgs& s = args.step;
  check_apart(op, "momentum", momentum, "out", out);
  check_apart(op, "momentum", momentum, "x", x);
  check_apart(op, "momentum", momentum, "grad", grad);
  if (center) check_apart(op, "momentum", momentum, "center", *center);
  check_dtype(op, "momentum", momentum, compute_dtype(x));
  if (s.batch.numel == 0) return;
  const int64_t chunks = x.size(0) * chunks_of(s.batch.inner).count;
  args.scratch = scratch_data(op, scratch, chunks, x);
  if (x.is_cuda()) {
    on_cuda(op, x, [&](void* stream) { return momentum_step_cuda(args, stream); });
  } else {
    on_cpu(chunks, [&](int64_t begin, int64_t end) { momentum_sums_cpu(args, begin, end); }, chunk_grain(s.batch));
    on_cpu(s.batch.numel, [&](int64_t begin, int64_t end) { momentum_step_cpu(args, begin, end); });
  }
}

ENSADV_OP(momentum_step,
          "(Tensor x, Tensor grad, Tensor(a!) momentum, Tensor? center, Tensor? step_n, Tensor? eps_n, float decay, "
          "float step, float eps, float lo, float hi, Tensor(b!) scratch, Tensor(c!) out) -> ()")

}  // namespace
}  // namespace ensadv::ops
