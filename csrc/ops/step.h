// The arguments that the steps along a gradient have in common, and their checks.
#pragma once

#include "common.h"

namespace ensadv::ops {

// The dtypes that a step may map x to: x's own, a narrower one from a float32 iterate, float32 from uint8 images.
inline void check_output_dtype(const char* op, Dtype x, Dtype out, const Tensor& t) {
  const bool allowed = out == x || (x == Dtype::f32 && out != Dtype::f64) || (x == Dtype::u8 && out == Dtype::f32);
  ENSADV_CHECK(allowed, op, "out must have x's dtype, or be 16-bit or uint8 for float32 x, float32 for uint8 x, got ",
               dtype_name(t.scalar_type()));
}

inline void check_grad_dtype(const char* op, Dtype x, Dtype grad, const Tensor& t) {
  ENSADV_CHECK(grad != Dtype::u8 && (grad == Dtype::f64) == (x == Dtype::f64), op,
               "grad must be floating point, and float64 if and only if x is, got ", dtype_name(t.scalar_type()));
}

inline const Tensor* pointer_to(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

// An input of x's shape. null: it is absent.
inline In step_input(const char* op, const char* name, const Tensor* t, const Tensor& x, const Tensor& out) {
  if (!t) return {};
  check_like(op, name, *t, x);
  check_overlap(op, name, out, *t);
  return in_ref(op, name, *t);
}

// Sizes and bounds as the schemas have them.
struct Sizes {
  const std::optional<Tensor>&step_n, &eps_n;
  double step, eps, lo, hi;
};

template <class Args>
Args step_args(const char* op, const Tensor& x, const Tensor* grad, const Tensor* center, const Sizes& sizes,
               const Tensor& out, const Tensor* momentum = nullptr) {
  check_like(op, "out", out, x);
  if (momentum) check_like(op, "momentum", *momentum, x);
  Args args;
  args.x = step_input(op, "x", &x, x, out);
  args.grad = step_input(op, "grad", grad, x, out);
  args.center = step_input(op, "center", center, x, out);
  args.out = out_ref(op, "out", out);
  common_format(op, {&x, grad, center, momentum, &out});
  check_output_dtype(op, args.x.dtype, args.out.dtype, out);
  if (grad) check_grad_dtype(op, args.x.dtype, args.grad.dtype, *grad);
  if (center) check_dtype(op, "center", *center, x.scalar_type());
  args.step = per_sample(op, "step", sizes.step_n, sizes.step, x, false);
  args.eps = per_sample(op, "eps", sizes.eps_n, sizes.eps, x, true);
  args.lo = sizes.lo;
  args.hi = sizes.hi;
  args.batch = batch_of(x);
  return args;
}

}  // namespace ensadv::ops
