#include "../kernels/sign_step.h"

#include "step.h"

namespace ensadv::ops {
namespace {

void sign_step(const Tensor x, const Tensor grad, const std::optional<Tensor> center,
               const std::optional<Tensor> step_n, const std::optional<Tensor> eps_n, double step, double eps,
               double lo, double hi, const Tensor out) {
  constexpr const char* op = "sign_step";
  const Sizes sizes{step_n, eps_n, step, eps, lo, hi};
  const auto args = step_args<SignStepArgs>(op, x, &grad, pointer_to(center), sizes, out);
  if (args.batch.numel == 0) return;
  if (x.is_cuda()) {
    on_cuda(op, x, [&](void* stream) { return sign_step_cuda(args, stream); });
  } else {
    on_cpu(args.batch.numel, [&](int64_t begin, int64_t end) { sign_step_cpu(args, begin, end); });
  }
}

ENSADV_OP(sign_step,
          "(Tensor x, Tensor grad, Tensor? center, Tensor? step_n, Tensor? eps_n, float step, float eps, float lo, "
          "float hi, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace ensadv::ops
