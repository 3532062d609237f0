#include "../kernels/ensemble_linear.h"

#include <algorithm>
#include <limits>

#include "mask.h"

namespace ensadv::ops {
namespace {

// A contiguous tensor of out's device, and of its dtype but for masks.
void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                 const Tensor& out, ScalarType dtype) {
  bool same = t.dim() == int64_t(shape.size()) && t.is_contiguous() && t.device() == out.device() &&
              t.scalar_type() == dtype;
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == shape.begin()[d];
  STD_TORCH_CHECK(same, op, ": ", name, " has not the shape, dtype or device that go with the others, or is not ",
                  "contiguous");
}

int32_t checked_extent(const char* op, int64_t n) {
  // Indices run a tile beyond the end.
  STD_TORCH_CHECK(n >= 0 && n <= std::numeric_limits<int32_t>::max() - 4096, op, ": unsupported shape");
  return int32_t(n);
}

void check_float(const char* op, const Tensor& out) {
  const Dtype dtype = dtype_of(op, out);
  STD_TORCH_CHECK(dtype == Dtype::f32 || dtype == Dtype::f16 || dtype == Dtype::bf16, op,
                  ": dtype must be float32, float16 or bfloat16");
}

void run(const char* op, const LinearArgs& args, const Tensor& out) {
  if (out.numel() == 0) return;
  if (out.is_cuda()) {
    on_cuda(op, out, [&](void* stream) { return ensemble_linear_cuda(args, stream); });
  } else {
    // A thread takes as many products as take about as long as moving kGrain elements.
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

// How large the products are: [batch, inner] by [inner, cols], for each member.
struct Extents {
  int64_t members, batch, inner, cols;
};

void run_product(const char* op, LinearArgs args, const Tensor& a, const Tensor& b, const Tensor& out,
                 const Extents& extents) {
  args.a = in_ref(op, a);
  args.b = in_ref(op, b);
  args.out = out_ref(op, out);
  args.members = extents.members;
  args.batch = checked_extent(op, extents.batch);
  args.inner = checked_extent(op, extents.inner);
  args.cols = checked_extent(op, extents.cols);
  run(op, args, out);
}

void ensemble_linear(const Tensor x, const Tensor weight, const std::optional<Tensor> bias, const Tensor y,
                     const std::optional<Tensor> mask) {
  constexpr const char* op = "ensemble_linear";
  check_float(op, y);
  STD_TORCH_CHECK(y.dim() == 3 && weight.dim() == 3 && (x.dim() == 2 || x.dim() == 3) && y.is_contiguous(), op,
                  ": weight and y must have three dimensions, x two or three");
  const int64_t members = y.size(0), batch = y.size(1), cols = y.size(2), inner = weight.size(2);
  LinearArgs args;
  args.shared = x.dim() == 2;
  if (args.shared) check_shape(op, "x", x, {batch, inner}, y, y.scalar_type());
  else check_shape(op, "x", x, {members, batch, inner}, y, y.scalar_type());
  check_shape(op, "weight", weight, {members, cols, inner}, y, y.scalar_type());
  check_apart(op, "y", y, "x", x);
  check_apart(op, "y", y, "weight", weight);
  if (bias) {
    check_shape(op, "bias", *bias, {members, cols}, y, y.scalar_type());
    check_apart(op, "y", y, "bias", *bias);
    args.bias = in_ref(op, *bias);
  }
  if (mask) args.mask = row_mask_data(op, *mask, {members, batch}, cols, y);
  run_product(op, args, x, weight, y, {members, batch, inner, cols});
}

void ensemble_linear_grad(const Tensor grad, const Tensor weight, const std::optional<Tensor> mask,
                          const Tensor out) {
  constexpr const char* op = "ensemble_linear_grad";
  check_float(op, out);
  STD_TORCH_CHECK(grad.dim() == 3 && weight.dim() == 3 && (out.dim() == 2 || out.dim() == 3) && out.is_contiguous(),
                  op, ": grad and weight must have three dimensions, out two or three");
  const int64_t members = grad.size(0), batch = grad.size(1), inner = grad.size(2), cols = weight.size(2);
  LinearArgs args;
  args.inner_first = true;
  args.reduce = out.dim() == 2;
  if (args.reduce) check_shape(op, "out", out, {batch, cols}, out, out.scalar_type());
  else check_shape(op, "out", out, {members, batch, cols}, out, out.scalar_type());
  check_shape(op, "grad", grad, {members, batch, inner}, out, out.scalar_type());
  check_shape(op, "weight", weight, {members, inner, cols}, out, out.scalar_type());
  check_apart(op, "out", out, "grad", grad);
  check_apart(op, "out", out, "weight", weight);
  if (mask) args.keep = row_mask_data(op, *mask, {members, batch}, inner, out);
  run_product(op, args, grad, weight, out, {members, batch, inner, cols});
}

LinearActArgs act_arguments(const char* op, const Tensor& out) {
  check_float(op, out);
  STD_TORCH_CHECK(out.dim() == 3 && out.is_contiguous(), op, ": out must be a contiguous [members, batch, outputs]");
  LinearActArgs args;
  args.out = out_ref(op, out);
  args.rows = out.size(0) * out.size(1);
  args.batch = out.size(1);
  args.cols = checked_extent(op, out.size(2));
  return args;
}

void ensemble_linear_act(const std::optional<Tensor> bias, const Tensor y, const std::optional<Tensor> mask) {
  constexpr const char* op = "ensemble_linear_act";
  LinearActArgs args = act_arguments(op, y);
  if (bias) {
    check_shape(op, "bias", *bias, {y.size(0), y.size(2)}, y, y.scalar_type());
    check_apart(op, "y", y, "bias", *bias);
    args.bias = in_ref(op, *bias);
  }
  if (mask) args.mask = row_mask_data(op, *mask, {y.size(0), y.size(1)}, y.size(2), y);
  run(op, args, y);
}

void ensemble_linear_act_grad(const Tensor grad, const Tensor mask, const Tensor out) {
  constexpr const char* op = "ensemble_linear_act_grad";
  LinearActArgs args = act_arguments(op, out);
  check_shape(op, "grad", grad, {out.size(0), out.size(1), out.size(2)}, out, out.scalar_type());
  check_overlap(op, "grad", out, grad);
  args.a = in_ref(op, grad);
  args.keep = row_mask_data(op, mask, {out.size(0), out.size(1)}, out.size(2), out);
  run(op, args, out);
}

ENSADV_OP(ensemble_linear, "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) y, Tensor(b!)? mask) -> ()")
ENSADV_OP(ensemble_linear_grad, "(Tensor grad, Tensor weight, Tensor? mask, Tensor(a!) out) -> ()")
ENSADV_OP(ensemble_linear_act, "(Tensor? bias, Tensor(a!) y, Tensor(b!)? mask) -> ()")
ENSADV_OP(ensemble_linear_act_grad, "(Tensor grad, Tensor mask, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace ensadv::ops
