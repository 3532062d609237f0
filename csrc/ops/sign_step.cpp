#include "../kernels/sign_step.h"

#include "common.h"

namespace ensadv::ops {
namespace {

void sign_step(const Tensor x, const Tensor grad, const std::optional<Tensor> center,
               const std::optional<Tensor> step_n, const std::optional<Tensor> eps_n, double step, double eps,
               double lo, double hi, const Tensor out) {
  constexpr const char* op = "sign_step";
  check_like(op, "grad", grad, x);
  check_like(op, "out", out, x);
  check_overlap(op, "x", out, x);
  check_overlap(op, "grad", out, grad);
  SignStepArgs args{in_ref(op, x), in_ref(op, grad), {}, out_ref(op, out),
                    per_sample(op, "step", step_n, step, x), per_sample(op, "eps", eps_n, eps, x), lo, hi,
                    batch_of(x)};
  if (center) {
    check_like(op, "center", *center, x);
    check_overlap(op, "center", out, *center);
    common_format(op, {&x, &grad, &*center, &out});
    args.center = in_ref(op, *center);
    STD_TORCH_CHECK(args.center.dtype == args.x.dtype, op, ": center must have x's dtype");
  } else {
    common_format(op, {&x, &grad, &out});
  }
  check_output_dtype(op, args.x.dtype, args.out.dtype);
  check_grad_dtype(op, args.x.dtype, args.grad.dtype);
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
