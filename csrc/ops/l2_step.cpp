#include "../kernels/l2_step.h"

#include "step.h"

namespace ensadv::ops {
namespace {

void l2_step(const Tensor x, const std::optional<Tensor> grad, const std::optional<Tensor> center,
             const std::optional<Tensor> step_n, const std::optional<Tensor> eps_n, double step, double eps, double lo,
             double hi, const Tensor scratch, const Tensor out) {
  constexpr const char* op = "l2_step";
  const Sizes sizes{step_n, eps_n, step, eps, lo, hi};
  auto args = step_args<L2StepArgs>(op, x, pointer_to(grad), pointer_to(center), sizes, out);
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
