#include "../kernels/null.h"

#include "common.h"

namespace ensadv::ops {
namespace {

void null(const Tensor x, const Tensor out) {
  constexpr const char* op = "null";
  check_like(op, "out", out, x);
  common_format(op, {&x, &out});
  check_overlap(op, "x", out, x);
  check_dtype(op, "out", out, x.scalar_type());
  const NullArgs args{in_ref(op, "x", x), out_ref(op, "out", out), batch_of(x)};
  if (args.batch.numel == 0) return;
  if (x.is_cuda()) {
    on_cuda(op, x, [&](void* stream) { return null_cuda(args, stream); });
  } else {
    on_cpu(args.batch.numel, [&](int64_t begin, int64_t end) { null_cpu(args, begin, end); });
  }
}

ENSADV_OP(null, "(Tensor x, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace ensadv::ops
