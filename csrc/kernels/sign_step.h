// sign_step: clip(x + step * sign(grad), lo, hi). Where a center is given, the moved x is projected on the L-inf ball
// (center, eps) before it is clipped.
#pragma once

#include "numeric.h"
#include "tensor_ref.h"

namespace ensadv {

struct SignStepArgs {
  In x, grad;
  In center;  // absent: no projection; 16-bit results are then rounded within the ball (x, |step|)
  Out out;
  PerSample step, eps;
  double lo = 0.0, hi = 1.0;
  Batch batch;
};

template <class T, bool kBall>
struct SignStep {
  using A = compute_t<T>;
  Box<T> box;

  ENSADV_HD T operator()(A x, A grad, A center, A step, A eps) const {
    A v = x + step * sign(grad);
    if constexpr (kBall) {
      v = min_nan(max_nan(v, center - eps), center + eps);
      return finish(v, center, eps, box);
    } else {
      return finish(v, x, step < A(0) ? -step : step, box);
    }
  }
};

void sign_step_cpu(const SignStepArgs& args, int64_t begin, int64_t end);
int sign_step_cuda(const SignStepArgs& args, void* stream);

}  // namespace ensadv
