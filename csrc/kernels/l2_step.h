// l2_step: clip(x + step * grad / ||grad||_2, lo, hi). Where a center is given, the moved x is projected on the L2 ball
// (center, eps) before it is clipped. Without a gradient the op is that projection alone.
#pragma once

#include "reduce.h"
#include "tensor_ref.h"

namespace ensadv {

struct L2StepArgs {
  In x;
  In grad;    // absent: no step
  In center;  // absent: no ball
  Out out;
  PerSample step, eps;
  double lo = 0.0, hi = 1.0;
  Batch batch;
  double* grad_sums = nullptr;   // [N, chunks]: sums of grad^2
  double* delta_sums = nullptr;  // [N, chunks]: sums of (moved - center)^2
};

// What the elements of one sample are moved and shrunk by.
template <class A>
struct L2Sample {
  A step, norm, shrink;
  bool moves;

  ENSADV_HD L2Sample(A step_, double grad_sum) : step(step_), norm(A(sqrt(grad_sum))), shrink(A(1)) {
    moves = is_usable(norm);
    norm = moves ? norm : A(1);
  }

  ENSADV_HD A moved(A x, A grad) const {
    const A g = grad != grad || !moves ? A(0) : grad;
    return x + step * (g / norm);
  }
};

// How far an element lies from the center. For NaN that is 0, so that a NaN does not change how others are projected.
template <class A>
ENSADV_HD double displacement(A v, A center) {
  const double d = double(v) - double(center);
  return d != d ? 0.0 : d;
}

template <class A>
ENSADV_HD A shrink_factor(double delta_sum, A eps) {
  const A length = A(sqrt(delta_sum));
  return length > eps ? eps / length : A(1);
}

template <class T, bool kBall>
struct L2Step {
  using A = compute_t<T>;
  Box<T> box;

  // The result before it is rounded and clipped. `reach`: the distance from the center that rounding to 16 bits must
  // not exceed.
  ENSADV_HD A operator()(A x, A grad, A center, const L2Sample<A>& s, A* reach) const {
    A v = s.moved(x, grad);
    const A c = kBall ? center : x;
    const A delta = v - c;
    v = kBall && s.shrink != A(1) ? c + delta * s.shrink : v;
    const A far = kBall ? delta * s.shrink : delta;
    *reach = far < A(0) ? -far : far;
    return v;
  }
  ENSADV_HD T operator()(A x, A grad, A center, const L2Sample<A>& s) const {
    A reach;
    const A v = (*this)(x, grad, center, s, &reach);
    return finish(v, kBall ? center : x, reach, box);
  }
};

// To be called in this order. The range counts chunks (reduce.h) in the first two, elements in the third.
void l2_grad_sums_cpu(const L2StepArgs& args, int64_t begin, int64_t end);
void l2_delta_sums_cpu(const L2StepArgs& args, int64_t begin, int64_t end);
void l2_step_cpu(const L2StepArgs& args, int64_t begin, int64_t end);
int l2_step_cuda(const L2StepArgs& args, void* stream);

}  // namespace ensadv
