#include "../kernels/act_grad.h"

#include "mask.h"

namespace ensadv::ops {
namespace {

void act_grad(const Tensor grad, const Tensor mask, const Tensor out, const std::optional<double> slope) {
  constexpr const char* op = "act_grad";
  check_like(op, "out", out, grad);
  check_overlap(op, "grad", out, grad);
  common_format(op, {&grad, &out});
  check_floating(op, "grad", grad);
  check_dtype(op, "out", out, grad.scalar_type());
  const ActGradArgs args{in_ref(op, "grad", grad), mask_data(op, mask, grad), out_ref(op, "out", out), grad.numel(),
                         slope.has_value(), slope.value_or(0.0)};
  check_apart(op, "out", out, "mask", mask);
  if (args.numel == 0) return;
  if (grad.is_cuda()) {
    on_cuda(op, grad, [&](void* stream) { return act_grad_cuda(args, stream); });
  } else {
    on_cpu_blocks(args.numel, [&](int64_t begin, int64_t end) { act_grad_cpu(args, begin, end); });
  }
}

ENSADV_OP(act_grad, "(Tensor grad, Tensor mask, Tensor(a!) out, float? slope=None) -> ()")

}  // namespace
}  // namespace ensadv::ops
