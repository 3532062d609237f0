#include "../kernels/ensemble_linear.h"

#include <algorithm>
#include <limits>

#include "mask.h"

namespace ensadv::ops {
namespace {

int32_t checked_extent(const char* op, int64_t n) {
  constexpr int64_t kMaxExtent = std::numeric_limits<int32_t>::max() - 4096;  // indices run a tile beyond the end
  ENSADV_CHECK(n <= kMaxExtent, op, "dimensions must be at most ", kMaxExtent, ", got ", n);
  return int32_t(n);
}

void check_float(const char* op, const char* name, const Tensor& t) {
  const Dtype dtype = dtype_of(op, name, t);
  ENSADV_CHECK(dtype == Dtype::f32 || dtype == Dtype::f16 || dtype == Dtype::bf16, op, name,
               " must be float32, float16 or bfloat16, got ", dtype_name(t.scalar_type()));
}

// A tensor with three dimensions, or with two if `flat` is allowed.
void check_dims(const char* op, const char* name, const Tensor& t, bool flat) {
  ENSADV_CHECK(t.dim() == 3 || (flat && t.dim() == 2), op, name, " must have ", flat ? "two or three" : "three",
               " dimensions, got ", shape_of(t));
}

void run(const char* op, const LinearArgs& args, const Tensor& out) {
  if (out.numel() == 0) return;
  if (out.is_cuda()) {
    on_cuda(op, out, [&](void* stream) { return ensemble_linear_cuda(args, stream); });
  } else {
    // A thread's share: as many products as take about the time of moving kGrain elements.
    on_cpu(linear_blocks(args), [&](int64_t begin, int64_t end) { ensemble_linear_cpu(args, begin, end); },
           std::max<int64_t>(1, kGrain / (int64_t(args.batch) * std::max(1, args.inner))));
  }
}

void run(const char* op, const LinearActArgs& args, const Tensor& out) {
  if (out.numel() == 0) return;
  if (out.is_cuda()) {
    on_cuda(op, out, [&](void* stream) { return ensemble_linear_act_cuda(args, stream); });
  } else {
    on_cpu(args.rows, [&](int64_t begin, int64_t end) { ensemble_linear_act_cpu(args, begin, end); },
           std::max<int64_t>(1, kGrain / args.cols));
  }
}

// The products' sizes: [batch, inner] by [inner, cols] for each member.
struct Extents {
  int64_t members, batch, inner, cols;
};

void run_product(const char* op, LinearArgs args, const Tensor& a, const Tensor& b, const Tensor& out,
                 const Extents& extents) {
  args.a = in_ref(op, "a", a);
  args.b = in_ref(op, "b", b);
  args.out = out_ref(op, "out", out);
  args.members = extents.members;
  args.batch = checked_extent(op, extents.batch);
  args.inner = checked_extent(op, extents.inner);
  args.cols = checked_extent(op, extents.cols);
  run(op, args, out);
}

void ensemble_linear(const Tensor x, const Tensor weight, const std::optional<Tensor> bias, const Tensor y,
                     const std::optional<Tensor> mask) {
  constexpr const char* op = "ensemble_linear";
  check_float(op, "y", y);
  check_dims(op, "y", y, false);
  check_dims(op, "weight", weight, false);
  check_dims(op, "x", x, true);
  const ScalarType dtype = y.scalar_type();
  const int64_t members = y.size(0), batch = y.size(1), cols = y.size(2), inner = weight.size(2);
  check_dense(op, "y", y, {members, batch, cols}, dtype, y);
  LinearArgs args;
  args.shared = x.dim() == 2;
  if (args.shared) check_dense(op, "x", x, {batch, inner}, dtype, y);
  else check_dense(op, "x", x, {members, batch, inner}, dtype, y);
  check_dense(op, "weight", weight, {members, cols, inner}, dtype, y);
  check_apart(op, "y", y, "x", x);
  check_apart(op, "y", y, "weight", weight);
  if (bias) {
    check_dense(op, "bias", *bias, {members, cols}, dtype, y);
    check_apart(op, "y", y, "bias", *bias);
    args.bias = in_ref(op, "bias", *bias);
  }
  if (mask) args.mask = row_mask_data(op, *mask, members, batch, cols, y);
  run_product(op, args, x, weight, y, {members, batch, inner, cols});
}

void ensemble_linear_grad(const Tensor grad, const Tensor weight, const std::optional<Tensor> mask,
                          const Tensor out) {
  constexpr const char* op = "ensemble_linear_grad";
  check_float(op, "out", out);
  check_dims(op, "grad", grad, false);
  check_dims(op, "weight", weight, false);
  check_dims(op, "out", out, true);
  const ScalarType dtype = out.scalar_type();
  const int64_t members = grad.size(0), batch = grad.size(1), inner = grad.size(2), cols = weight.size(2);
  LinearArgs args;
  args.inner_first = true;
  args.reduce = out.dim() == 2;
  if (args.reduce) check_dense(op, "out", out, {batch, cols}, dtype, out);
  else check_dense(op, "out", out, {members, batch, cols}, dtype, out);
  check_dense(op, "grad", grad, {members, batch, inner}, dtype, out);
  check_dense(op, "weight", weight, {members, inner, cols}, dtype, out);
  check_apart(op, "out", out, "grad", grad);
  check_apart(op, "out", out, "weight", weight);
  if (mask) args.keep = row_mask_data(op, *mask, members, batch, inner, out);
  run_product(op, args, grad, weight, out, {members, batch, inner, cols});
}

LinearActArgs act_arguments(const char* op, const char* name, const Tensor& out) {
  check_float(op, name, out);
  check_dims(op, name, out, false);
  check_dense(op, name, out, {out.size(0), out.size(1), out.size(2)}, out.scalar_type(), out);
  LinearActArgs args;
  args.out = out_ref(op, name, out);
  args.rows = out.size(0) * out.size(1);
  args.batch = out.size(1);
  args.cols = checked_extent(op, out.size(2));
  return args;
}

void ensemble_linear_act(const std::optional<Tensor> bias, const Tensor y, const std::optional<Tensor> mask) {
  constexpr const char* op = "ensemble_linear_act";
  LinearActArgs args = act_arguments(op, "y", y);
  if (bias) {
    check_dense(op, "bias", *bias, {y.size(0), y.size(2)}, y.scalar_type(), y);
    check_apart(op, "y", y, "bias", *bias);
    args.bias = in_ref(op, "bias", *bias);
  }
  if (mask) args.mask = row_mask_data(op, *mask, y.size(0), y.size(1), y.size(2), y);
  run(op, args, y);
}

void ensemble_linear_act_grad(const Tensor grad, const Tensor mask, const Tensor out) {
  constexpr const char* op = "ensemble_linear_act_grad";
  LinearActArgs args = act_arguments(op, "out", out);
  check_dense(op, "grad", grad, {out.size(0), out.size(1), out.size(2)}, out.scalar_type(), out);
  check_overlap(op, "grad", out, grad);
  args.a = in_ref(op, "grad", grad);
  args.keep = row_mask_data(op, mask, out.size(0), out.size(1), out.size(2), out);
  run(op, args, out);
}

ENSADV_OP(ensemble_linear, "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) y, Tensor(b!)? mask) -> ()")
ENSADV_OP(ensemble_linear_grad, "(Tensor grad, Tensor weight, Tensor? mask, Tensor(a!) out) -> ()")
ENSADV_OP(ensemble_linear_act, "(Tensor? bias, Tensor(a!) y, Tensor(b!)? mask) -> ()")
ENSADV_OP(ensemble_linear_act_grad, "(Tensor grad, Tensor mask, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace ensadv::ops
