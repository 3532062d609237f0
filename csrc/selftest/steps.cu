#include "../kernels/l2_step.h"
#include "../kernels/momentum_step.h"
#include "../kernels/null.h"
#include "../kernels/sign_step.h"
#include "harness.h"

namespace ensadv::selftest {
namespace {

void check_null(Harness& harness, Dtype dtype, bool misaligned) {
  const std::string name = std::string("null ") + name_of(dtype) + (misaligned ? " misaligned" : "");
  harness.over_shapes(name, [&](const Shape& s) {
    const int64_t n = s.samples * s.inner;
    const TwinPtr x = random_values(dtype, n, 0, 1, misaligned, 1);
    Twin out(n * size_of(dtype), 0);
    const auto arguments = [&](Side side) {
      return NullArgs{in_of(x, dtype, side), out_of(out, dtype, side), {n, s.inner}};
    };
    null_cpu(arguments(Side::host), 0, n);
    harness.must_finish(null_cuda(arguments(Side::device), harness.stream()), "null");
    return out.difference(dtype);
  });
}

enum class Step { sign, momentum, l2, project };  // project: l2_step without a gradient

struct StepCase {
  Step op;
  Dtype x, grad, out;
  Variant variant;

  bool reduces() const { return op != Step::sign; }
  Dtype compute() const { return out == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
  const char* op_name() const {
    return op == Step::sign ? "sign_step" : op == Step::momentum ? "momentum_step" : "l2_step";
  }
  std::string name() const {
    const std::string grad_name = op == Step::project ? "none" : name_of(grad);
    return std::string(op_name()) + " " + name_of(x) + " grad " + grad_name + " out " + name_of(out) + ", " +
           variant.name;
  }
};

// All tensors of one call.
class StepData {
 public:
  StepData(const StepCase& c, const Shape& s)
      : case_(c), inner_(s.inner), n_(s.samples * s.inner), chunks_(s.samples * chunks_of(s.inner).count),
        grad_sums_(c.reduces() ? 8 * chunks_ : 0, 0), delta_sums_(c.reduces() ? 8 * chunks_ : 0, 0) {
    const Variant& v = c.variant;
    // An infinite number makes a reducing op skip its whole sample, so specials come only now and then.
    const bool specials = !c.reduces() || s.inner % 3 == 0;
    x_ = random_values(c.x, n_, -0.05, 1.05, v.misaligned_in, 1, specials);
    if (c.op != Step::project) grad_ = random_values(c.grad, n_, -1, 1, v.misaligned_in, 2, specials);
    if (v.ball) center_ = random_values(c.x, n_, 0, 1, v.misaligned_in, 3, specials);
    if (v.step_n) step_ = random_sizes(c.x, s.samples, 4);
    if (v.eps_n) eps_ = random_sizes(c.x, s.samples, 5);
    momentum_ = random_values(c.compute(), c.op == Step::momentum ? n_ : 0, -1, 1, v.misaligned_in, 6, false);
    fresh_ = v.fresh_out(n_, c.out);
  }

  Twin& out() { return fresh_ ? *fresh_ : *x_; }

  void run_cpu() {
    if (case_.op == Step::sign) {
      sign_step_cpu(arguments<SignStepArgs>(Side::host), 0, n_);
    } else if (case_.op == Step::momentum) {
      momentum_sums_cpu(momentum_arguments(Side::host), 0, chunks_);
      momentum_step_cpu(momentum_arguments(Side::host), 0, n_);
    } else {
      if (grad_) l2_grad_sums_cpu(l2_arguments(Side::host), 0, chunks_);
      if (center_) l2_delta_sums_cpu(l2_arguments(Side::host), 0, chunks_);
      l2_step_cpu(l2_arguments(Side::host), 0, n_);
    }
  }

  int run_cuda(cudaStream_t stream) {
    if (case_.op == Step::sign) return sign_step_cuda(arguments<SignStepArgs>(Side::device), stream);
    if (case_.op == Step::momentum) return momentum_step_cuda(momentum_arguments(Side::device), stream);
    return l2_step_cuda(l2_arguments(Side::device), stream);
  }

  std::string difference() {
    const std::string of_grad = grad_sums_.difference(Dtype::f64);
    if (!of_grad.empty()) return "grad sums: " + of_grad;
    const std::string of_delta = delta_sums_.difference(Dtype::f64);
    if (!of_delta.empty()) return "delta sums: " + of_delta;
    const std::string of_momentum = momentum_->difference(case_.compute());
    if (!of_momentum.empty()) return "momentum: " + of_momentum;
    return out().difference(case_.out);
  }

 private:
  template <class Args>
  Args arguments(Side side) {
    Args args{};
    args.x = in_of(x_, case_.x, side);
    args.grad = in_of(grad_, case_.grad, side);
    args.center = in_of(center_, case_.x, side);
    args.out = out_of(out(), case_.out, side);
    args.step = {data_of(step_, side), case_.reduces() ? 0.5 : -8 / 255.};
    args.eps = {data_of(eps_, side), 8 / 255.};
    args.lo = case_.variant.lo;
    args.hi = case_.variant.hi;
    args.batch = {n_, inner_};
    return args;
  }
  MomentumStepArgs momentum_arguments(Side side) {
    return {arguments<SignStepArgs>(side), data_of(momentum_, side), data_as<double>(grad_sums_, side), 0.9};
  }
  L2StepArgs l2_arguments(Side side) {
    L2StepArgs args = arguments<L2StepArgs>(side);
    args.grad_sums = data_as<double>(grad_sums_, side);
    args.delta_sums = data_as<double>(delta_sums_, side);
    return args;
  }

  const StepCase& case_;
  const int64_t inner_, n_, chunks_;
  TwinPtr x_, grad_, center_, step_, eps_, momentum_, fresh_;
  Twin grad_sums_, delta_sums_;
};

void check_step(Harness& harness, const StepCase& c) {
  harness.over_shapes(c.name(), [&](const Shape& s) {
    StepData data(c, s);
    data.run_cpu();
    harness.must_finish(data.run_cuda(harness.stream()), c.op_name());
    return data.difference();
  });
}

constexpr Variant kVariants[] = {
    {.name = "free"},
    {.name = "free, step [N]", .step_n = true},
    {.name = "ball", .ball = true},
    {.name = "ball, step and eps [N]", .ball = true, .step_n = true, .eps_n = true},
    {.name = "ball, eps [N], inputs misaligned", .ball = true, .eps_n = true, .misaligned_in = true},
    {.name = "ball, out misaligned", .ball = true, .misaligned_out = true},
    {.name = "free, no box", .lo = -kInf, .hi = kInf},
    {.name = "ball, eps [N], in place", .ball = true, .eps_n = true, .in_place = true},
};

}  // namespace

void check_steps(Harness& harness) {
  for (Dtype dtype : kAll)
    for (bool misaligned : {false, true}) check_null(harness, dtype, misaligned);
  constexpr Dtype f32 = Dtype::f32, f16 = Dtype::f16, bf16 = Dtype::bf16, f64 = Dtype::f64, u8 = Dtype::u8;
  for (Step op : {Step::sign, Step::momentum, Step::l2, Step::project})
    for (const Variant& v : kVariants) {
      if (op == Step::project && !v.ball) continue;
      check_step(harness, {op, f64, f64, f64, v});
      for (Dtype g : {f32, f16, bf16}) {
        for (Dtype t : {f32, f16, bf16, u8}) check_step(harness, {op, t, g, t, v});
        if (!v.in_place) {
          for (Dtype t : {f16, bf16, u8}) check_step(harness, {op, f32, g, t, v});
          check_step(harness, {op, u8, g, f32, v});
        }
        if (op == Step::project) break;  // without a gradient there is one case
      }
    }
}

}  // namespace ensadv::selftest
