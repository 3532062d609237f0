#include "../kernels/split_key.h"

#include "common.h"

namespace ensadv::ops {
namespace {

void split_key(const Tensor key, const Tensor out) {
  constexpr const char* op = "split_key";
  ENSADV_CHECK(out.dim() == 2 && out.size(1) == 2 && out.is_contiguous() && out.scalar_type() == ScalarType::Long, op,
               "out must be contiguous int64 [n, 2], got ", described(out));
  const SplitKeyArgs args{int64_data(op, "key", key, 2, out), static_cast<int64_t*>(out.data_ptr()), out.size(0)};
  check_overlap(op, "key", out, key);
  if (args.n == 0) return;
  if (out.is_cuda()) {
    on_cuda(op, out, [&](void* stream) { return split_key_cuda(args, stream); });
  } else {
    split_key_cpu(args);
  }
}

ENSADV_OP(split_key, "(Tensor key, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace ensadv::ops
