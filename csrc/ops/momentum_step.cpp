#include "../kernels/momentum_step.h"

#include "common.h"

namespace ensadv::ops {
namespace {

void momentum_step(const Tensor x, const Tensor grad, const Tensor momentum, const std::optional<Tensor> center,
                   const std::optional<Tensor> step_n, const std::optional<Tensor> eps_n, double decay, double step,
                   double eps, double lo, double hi, const Tensor scratch, const Tensor out) {
  constexpr const char* op = "momentum_step";
  check_like(op, "grad", grad, x);
  check_like(op, "momentum", momentum, x);
  check_like(op, "out", out, x);
  check_overlap(op, "x", out, x);
  check_overlap(op, "grad", out, grad);
  check_apart(op, "momentum", momentum, "out", out);
  check_apart(op, "momentum", momentum, "x", x);
  check_apart(op, "momentum", momentum, "grad", grad);
  MomentumStepArgs args{{in_ref(op, x), in_ref(op, grad), {}, out_ref(op, out),
                         per_sample(op, "step", step_n, step, x), per_sample(op, "eps", eps_n, eps, x), lo, hi,
                         batch_of(x)},
                        momentum.data_ptr(), nullptr, decay};
  SignStepArgs& s = args.step;
  if (center) {
    check_like(op, "center", *center, x);
    check_overlap(op, "center", out, *center);
    check_apart(op, "momentum", momentum, "center", *center);
    common_format(op, {&x, &grad, &momentum, &*center, &out});
    s.center = in_ref(op, *center);
    STD_TORCH_CHECK(s.center.dtype == s.x.dtype, op, ": center must have x's dtype");
  } else {
    common_format(op, {&x, &grad, &momentum, &out});
  }
  check_output_dtype(op, s.x.dtype, s.out.dtype);
  check_grad_dtype(op, s.x.dtype, s.grad.dtype);
  STD_TORCH_CHECK(dtype_of(op, momentum) == (s.x.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32), op,
                  ": momentum must be float32 (float64 for float64 x)");
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
