// What the steps along a gradient take, and what of it protects memory.
#pragma once

#include "common.h"

namespace ensadv::ops {

// The dtypes a step may map x to: its own, a narrower one from a float32 iterate, float32 from uint8 images.
inline void check_output_dtype(const char* op, Dtype x, Dtype out) {
  const bool allowed = out == x || (x == Dtype::f32 && out != Dtype::f64) || (x == Dtype::u8 && out == Dtype::f32);
  STD_TORCH_CHECK(allowed, op, ": out must have x's dtype, or be 16-bit or uint8 for float32 x, float32 for uint8 x");
}

inline void check_grad_dtype(const char* op, Dtype x, Dtype grad) {
  STD_TORCH_CHECK(grad != Dtype::u8 && (grad == Dtype::f64) == (x == Dtype::f64), op,
                  ": grad must be a float dtype, float64 if and only if x is");
}

inline const Tensor* pointer_to(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

// An input that is walked beside x and out; null where it is absent.
inline In step_input(const char* op, const char* name, const Tensor* t, const Tensor& x, const Tensor& out) {
  if (!t) return {};
  check_like(op, name, *t, x);
  check_overlap(op, name, out, *t);
  return in_ref(op, *t);
}

// Sizes and bounds, as schemas have them.
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
  args.out = out_ref(op, out);
  common_format(op, {&x, grad, center, momentum, &out});
  check_output_dtype(op, args.x.dtype, args.out.dtype);
  if (grad) check_grad_dtype(op, args.x.dtype, args.grad.dtype);
  STD_TORCH_CHECK(!center || args.center.dtype == args.x.dtype, op, ": center must have x's dtype");
  args.step = per_sample(op, "step", sizes.step_n, sizes.step, x, false);
  args.eps = per_sample(op, "eps", sizes.eps_n, sizes.eps, x, true);
  args.lo = sizes.lo;
  args.hi = sizes.hi;
  args.batch = batch_of(x);
  return args;
}

}  // namespace ensadv::ops
