#include "../kernels/bias_act.h"

#include "mask.h"

namespace ensadv::ops {
namespace {

void bias_act(const Tensor x, const std::optional<Tensor> bias, const std::optional<Tensor> residual, const Tensor out,
              const std::optional<Tensor> mask, int64_t act, double low, double high, double slope) {
  constexpr const char* op = "bias_act";
  STD_TORCH_CHECK(x.dim() >= 2, op, ": x must have shape [N, C, ...]");
  check_like(op, "out", out, x);
  check_overlap(op, "x", out, x);
  STD_TORCH_CHECK(act >= 0 && act <= int64_t(Act::leaky_relu), op, ": no such act");
  BiasActArgs args;
  args.act = Act(act);
  args.low = low;
  args.high = high;
  args.slope = slope;
  args.x = in_ref(op, x);
  args.out = out_ref(op, out);
  STD_TORCH_CHECK(args.x.dtype != Dtype::u8 && args.out.dtype == args.x.dtype, op,
                  ": x must be floating point, and out of its dtype");
  if (residual) {
    check_like(op, "residual", *residual, x);
    check_overlap(op, "residual", out, *residual);
    args.residual = in_ref(op, *residual);
    STD_TORCH_CHECK(args.residual.dtype == args.x.dtype, op, ": residual must have x's dtype");
  }
  const Format format = common_format(op, {&x, residual ? &*residual : nullptr, &out});
  args.numel = x.numel();
  args.channels = x.size(1);
  if (args.numel == 0) return;
  args.channel_stride = format == Format::channels_last ? 1 : args.numel / (x.size(0) * args.channels);
  if (bias) {
    const auto compute_type = args.x.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == args.channels && bias->is_contiguous() &&
                        bias->device() == x.device() && bias->scalar_type() == compute_type,
                    op, ": bias must be a contiguous [C] tensor on x's device, float32 (float64 for float64 x)");
    check_apart(op, "out", out, "bias", *bias);
    args.bias = bias->data_ptr();
  }
  if (mask) {
    args.mask = mask_data(op, *mask, x);
    check_apart(op, "mask", *mask, "out", out);
    check_apart(op, "mask", *mask, "x", x);
    if (residual) check_apart(op, "mask", *mask, "residual", *residual);
    if (bias) check_apart(op, "mask", *mask, "bias", *bias);
  }
  if (x.is_cuda()) {
    on_cuda(op, x, [&](void* stream) { return bias_act_cuda(args, stream); });
  } else {
    on_cpu_blocks(args.numel, [&](int64_t begin, int64_t end) { bias_act_cpu(args, begin, end); });
  }
}

ENSADV_OP(bias_act, "(Tensor x, Tensor? bias, Tensor? residual, Tensor(a!) out, Tensor(b!)? mask, int act=0, "
                    "float low=0., float high=0., float slope=1.) -> ()")

}  // namespace
}  // namespace ensadv::ops
