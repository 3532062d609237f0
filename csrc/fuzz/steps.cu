#include "../kernels/l2_step.h"
#include "../kernels/momentum_step.h"
#include "../kernels/null.h"
#include "../kernels/random_step.h"
#include "../kernels/sample_eps.h"
#include "../kernels/sign_step.h"
#include "../kernels/split_key.h"
#include "fuzz.h"

namespace ensadv {

std::string null_op(Draw& draw) {
  const Dtype t = any_dtype(draw);
  const int64_t n = draw.size();
  const BufferPtr x = numbers(draw, t, n, 0, 1), out = room(draw, n, t);
  const auto args = [&](bool host) { return NullArgs{{at(x, host), t}, {at(out, host), t}, {n, n}}; };
  null_cpu(args(true), 0, n);
  launched(null_cuda(args(false), nullptr), "null");
  return out->difference(t);
}

namespace {

// The tensors of an op that steps along a gradient.
struct StepCase {
  Dtype xt, gt, ot;
  int64_t samples, inner, n;
  BufferPtr x, grad, center, step, eps, fresh;
  double lo = 0, hi = 1, step_size, eps_size;

  StepCase(Draw& draw, bool may_lack_gradient) {
    xt = any_dtype(draw);
    ot = xt;
    if (xt == Dtype::f32) ot = draw.one_of({Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::u8});
    if (xt == Dtype::u8) ot = draw.one_of({Dtype::u8, Dtype::f32});
    gt = xt == Dtype::f64 ? Dtype::f64 : draw.one_of({Dtype::f32, Dtype::f16, Dtype::bf16});
    inner = draw.size();
    samples = inner > 1000 ? draw.between(1, 3) : draw.between(1, 9);
    n = samples * inner;
    x = numbers(draw, xt, n, -0.05, 1.05);
    if (!may_lack_gradient || !draw.once_in(4)) grad = numbers(draw, gt, n, -1, 1);
    if (!grad || draw.once_in(2)) center = numbers(draw, xt, n, 0, 1);
    if (draw.once_in(3)) step = numbers(draw, wide_of(xt), samples, -0.1, 0.3);
    if (draw.once_in(3)) eps = numbers(draw, wide_of(xt), samples, -0.1, 0.3);
    if (!(xt == ot && draw.once_in(4))) fresh = room(draw, n, ot);
    if (draw.once_in(4)) lo = -INFINITY, hi = INFINITY;
    step_size = draw.one_of({8 / 255., -2 / 255., 0.5, 0.0, 3.0});
    eps_size = draw.one_of({8 / 255., 0.25, 0.0, 2.0});
  }
  Buffer& out() { return fresh ? *fresh : *x; }

  template <class Args>
  Args args(bool host) {
    Args a{};
    a.x = {at(x, host), xt};
    a.grad = {at(grad, host), gt};
    a.center = {at(center, host), xt};
    a.out = {out().on(host), ot};
    a.step = {at(step, host), step_size};
    a.eps = {at(eps, host), eps_size};
    a.lo = lo;
    a.hi = hi;
    a.batch = {n, inner};
    return a;
  }
};

}  // namespace

std::string sign_step(Draw& draw) {
  StepCase c(draw, false);
  sign_step_cpu(c.args<SignStepArgs>(true), 0, c.n);
  launched(sign_step_cuda(c.args<SignStepArgs>(false), nullptr), "sign_step");
  return c.out().difference(c.ot);
}

std::string momentum_step(Draw& draw) {
  StepCase c(draw, false);
  const int64_t chunks = c.samples * chunks_of(c.inner).count;
  const Dtype wide = wide_of(c.ot);
  const BufferPtr momentum = numbers(draw, wide, c.n, -1, 1);
  Buffer sums(8 * chunks, 0);
  const auto args = [&](bool host) {
    auto* scratch = reinterpret_cast<double*>(sums.on(host));
    return MomentumStepArgs{c.args<SignStepArgs>(host), at(momentum, host), scratch, 0.9};
  };
  momentum_sums_cpu(args(true), 0, chunks);
  momentum_step_cpu(args(true), 0, c.n);
  launched(momentum_step_cuda(args(false), nullptr), "momentum_step");
  std::string problem = sums.difference(Dtype::f64);
  if (problem.empty()) problem = momentum->difference(wide);
  return problem.empty() ? c.out().difference(c.ot) : problem;
}

std::string l2_step(Draw& draw) {
  StepCase c(draw, true);
  const int64_t chunks = c.samples * chunks_of(c.inner).count;
  Buffer grad_sums(8 * chunks, 0), delta_sums(8 * chunks, 0);
  const auto args = [&](bool host) {
    L2StepArgs a = c.args<L2StepArgs>(host);
    a.grad_sums = reinterpret_cast<double*>(grad_sums.on(host));
    a.delta_sums = reinterpret_cast<double*>(delta_sums.on(host));
    return a;
  };
  if (c.grad) l2_grad_sums_cpu(args(true), 0, chunks);
  if (c.center) l2_delta_sums_cpu(args(true), 0, chunks);
  l2_step_cpu(args(true), 0, c.n);
  launched(l2_step_cuda(args(false), nullptr), "l2_step");
  std::string problem = c.grad ? grad_sums.difference(Dtype::f64) : "";
  if (problem.empty() && c.center) problem = delta_sums.difference(Dtype::f64);
  return problem.empty() ? c.out().difference(c.ot) : problem;
}

std::string random_step(Draw& draw) {
  const Dtype t = any_dtype(draw), ot = t == Dtype::u8 && draw.once_in(2) ? Dtype::f32 : t;
  const int64_t channels = draw.between(1, 5), spatial = 1 + draw.size() / channels, inner = channels * spatial;
  const int64_t samples = draw.between(1, 4), n = samples * inner;
  const BufferPtr x = numbers(draw, t, n, -0.05, 1.05), key = a_key(draw);
  const BufferPtr eps = draw.once_in(2) ? numbers(draw, wide_of(t), samples, -0.1, 0.3) : nullptr;
  const BufferPtr index = draw.once_in(2) ? integers64(draw, samples, 0, INT64_MAX / 2) : nullptr;
  const BufferPtr fresh = t == ot && draw.once_in(3) ? nullptr : room(draw, n, ot);
  const Noise noise = Noise(draw.below(4));
  const double far = draw.once_in(4) ? INFINITY : 0.0;
  const auto args = [&](bool host) {
    return RandomStepArgs{{at(x, host), t},
                          {at(fresh ? fresh : x, host), ot},
                          ints(key, host),
                          ints(index, host),
                          {at(eps, host), 8 / 255.},
                          noise,
                          -far,
                          1 + far,
                          {n, inner},
                          {channels, spatial}};
  };
  random_step_cpu(args(true), 0, n);
  launched(random_step_cuda(args(false), nullptr), "random_step");
  return (fresh ? fresh : x)->difference(ot);
}

std::string keys(Draw& draw) {
  const BufferPtr key = a_key(draw);
  const int64_t n = draw.between(1, 700);
  if (draw.once_in(2)) {
    Buffer out(16 * n, 0);
    const auto args = [&](bool host) {
      return SplitKeyArgs{ints(key, host), reinterpret_cast<int64_t*>(out.on(host)), n};
    };
    split_key_cpu(args(true));
    launched(split_key_cuda(args(false), nullptr), "split_key");
    return out.difference(Dtype::u8);
  }
  const BufferPtr index = draw.once_in(2) ? integers64(draw, n, 0, INT64_MAX / 2) : nullptr;
  Buffer out(4 * n, 0);
  const EpsDist dist = EpsDist(draw.below(3));
  const auto args = [&](bool host) {
    return SampleEpsArgs{reinterpret_cast<float*>(out.on(host)),
                         n,
                         ints(key, host),
                         ints(index, host),
                         dist,
                         16 / 255.,
                         8 / 255.,
                         std::erf(std::sqrt(2.0))};
  };
  sample_eps_cpu(args(true));
  launched(sample_eps_cuda(args(false), nullptr), "sample_eps");
  // Two libraries' log() may differ in a double's last place, and so the float by one spacing, rarely.
  return dist == EpsDist::truncated_normal ? "" : out.difference(Dtype::f32);
}

}  // namespace ensadv
