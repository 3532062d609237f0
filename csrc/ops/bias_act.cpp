#include "../kernels/bias_act.h"

#include "mask.h"

namespace ensadv::ops {
namespace {

void add_residual(const char* op, const Tensor& residual, const Tensor& x, const Tensor& out, BiasActArgs& args) {
  check_like(op, "residual", residual, x);
  check_overlap(op, "residual", out, residual);
  check_dtype(op, "residual", residual, x.scalar_type());
  args.residual = in_ref(op, "residual", residual);
}

void add_mask(const char* op, const Tensor& mask, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual, const Tensor& x, const Tensor& out, BiasActArgs& args) {
  args.mask = mask_data(op, mask, x);
  check_apart(op, "mask", mask, "out", out);
  check_apart(op, "mask", mask, "x", x);
  if (residual) check_apart(op, "mask", mask, "residual", *residual);
  if (bias) check_apart(op, "mask", mask, "bias", *bias);
}

void bias_act(const Tensor x, const std::optional<Tensor> bias, const std::optional<Tensor> residual, const Tensor out,
              const std::optional<Tensor> mask, int64_t act, double low, double high, double slope) {
  constexpr const char* op = "bias_act";
  ENSADV_CHECK(x.dim() >= 2, op, "x must have shape [N, C, ...], got ", shape_of(x));
  check_like(op, "out", out, x);
  check_overlap(op, "x", out, x);
  check_choice(op, "act", act, int64_t(Act::leaky_relu));
  check_floating(op, "x", x);
  check_dtype(op, "out", out, x.scalar_type());
  BiasActArgs args;
  args.act = Act(act);
  args.low = low;
  args.high = high;
  args.slope = slope;
  args.x = in_ref(op, "x", x);
  args.out = out_ref(op, "out", out);
  if (residual) add_residual(op, *residual, x, out, args);
  const Format format = common_format(op, {&x, residual ? &*residual : nullptr, &out});
  args.numel = x.numel();
  args.channels = x.size(1);
  if (args.numel == 0) return;
  args.channel_stride = format == Format::channels_last ? 1 : args.numel / (x.size(0) * args.channels);
  if (bias) {
    check_dense(op, "bias", *bias, {args.channels}, compute_dtype(x), x);
    check_apart(op, "out", out, "bias", *bias);
    args.bias = bias->data_ptr();
  }
  if (mask) add_mask(op, *mask, bias, residual, x, out, args);
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
