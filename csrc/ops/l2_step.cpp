#include "../kernels/l2_step.h"

#include "common.h"

namespace ensadv::ops {
namespace {

void l2_step(const Tensor x, const std::optional<Tensor> grad, const std::optional<Tensor> center,
             const std::optional<Tensor> step_n, const std::optional<Tensor> eps_n, double step, double eps, double lo,
             double hi, const Tensor scratch, const Tensor out) {
  constexpr const char* op = "l2_step";
  check_like(op, "out", out, x);
  check_overlap(op, "x", out, x);
  common_format(op, {&x, &out});
  L2StepArgs args{in_ref(op, x), {}, {}, out_ref(op, out), per_sample(op, "step", step_n, step, x),
                  per_sample(op, "eps", eps_n, eps, x), lo, hi, batch_of(x)};
  check_output_dtype(op, args.x.dtype, args.out.dtype);
  if (grad) {
    check_like(op, "grad", *grad, x);
    check_overlap(op, "grad", out, *grad);
    common_format(op, {&x, &*grad, &out});
    args.grad = in_ref(op, *grad);
    check_grad_dtype(op, args.x.dtype, args.grad.dtype);
  }
  if (center) {
    check_like(op, "center", *center, x);
    check_overlap(op, "center", out, *center);
    common_format(op, {&x, &*center, &out});
    args.center = in_ref(op, *center);
    STD_TORCH_CHECK(args.center.dtype == args.x.dtype, op, ": center must have x's dtype");
  }
  if (args.batch.numel == 0) return;
  const int64_t chunks = x.size(0) * chunks_of(args.batch.inner).count;
  args.grad_sums = scratch_data(op, scratch, 2 * chunks, x);
  args.delta_sums = args.grad_sums + chunks;
  if (x.is_cuda()) {
    on_cuda(op, x, [&](void* stream) { return l2_step_cuda(args, stream); });
    return;
  }
  const int64_t grain = chunk_grain(args.batch);
  if (grad) on_cpu(chunks, [&](int64_t begin, int64_t end) { l2_grad_sums_cpu(args, begin, end); }, grain);
  if (center) on_cpu(chunks, [&](int64_t begin, int64_t end) { l2_delta_sums_cpu(args, begin, end); }, grain);
  on_cpu(args.batch.numel, [&](int64_t begin, int64_t end) { l2_step_cpu(args, begin, end); });
}

ENSADV_OP(l2_step,
          "(Tensor x, Tensor? grad, Tensor? center, Tensor? step_n, Tensor? eps_n, float step, float eps, float lo, "
          "float hi, Tensor(a!) scratch, Tensor(b!) out) -> ()")

}  // namespace
}  // namespace ensadv::ops
