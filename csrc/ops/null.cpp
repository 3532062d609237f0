#include "../kernels/null.h"

#include "common.h"

namespace ensadv::ops {
namespace {

void null(const Tensor x, const Tensor out) {
  check_like("null", "out", out, x);
  common_format("null", {&x, &out});
  check_overlap("null", "x", out, x);
  const NullArgs args{in_ref("null", x), out_ref("null", out), batch_of(x)};
  STD_TORCH_CHECK(args.x.dtype == args.out.dtype, "null: out must have x's dtype");
  if (args.batch.numel == 0) return;
  if (x.is_cuda()) {
    on_cuda("null", x, [&](void* stream) { return null_cuda(args, stream); });
  } else {
    on_cpu(args.batch.numel, [&](int64_t begin, int64_t end) { null_cpu(args, begin, end); });
  }
}

ENSADV_OP(null, "(Tensor x, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace ensadv::ops
