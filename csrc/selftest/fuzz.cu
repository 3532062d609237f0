// Random calls of every CUDA launcher against its CPU launcher: odd lengths, misaligned bases, all dtypes and modes.
// fuzz SEED COUNT [OP]: COUNT calls from SEED on; a line for each that differs, with what draws it again, and
// "N calls, N failed". Each call runs on one of the devices that there are.
#include <functional>
#include <map>

#include "../kernels/act_grad.h"
#include "../kernels/bias_act.h"
#include "../kernels/ensemble_linear.h"
#include "../kernels/l2_step.h"
#include "../kernels/logit_grad.h"
#include "../kernels/model_entry.h"
#include "../kernels/momentum_step.h"
#include "../kernels/null.h"
#include "../kernels/random_step.h"
#include "../kernels/sample_eps.h"
#include "../kernels/sign_step.h"
#include "../kernels/split_key.h"
#include "fuzz_case.h"

namespace ensadv {
namespace {

constexpr Dtype kFloats[] = {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64};

void launched(int error, const char* what) {
  must(error, what);
  must(int(cudaDeviceSynchronize()), what);
}

Dtype any_float(Draw& draw) { return kFloats[draw.below(4)]; }
Dtype any_dtype(Draw& draw) { return draw.once_in(5) ? Dtype::u8 : any_float(draw); }
Dtype wide_of(Dtype t) { return t == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
char* at(const BufferPtr& b, bool host) { return b ? b->on(host) : nullptr; }
const int64_t* ints(const BufferPtr& b, bool host) { return reinterpret_cast<const int64_t*>(at(b, host)); }
BufferPtr room(Draw& draw, int64_t n, Dtype t) {
  auto buffer = std::make_unique<Buffer>(n * size_of(t), draw.once_in(4) ? size_of(t) * draw.below(16) : 0);
  buffer->upload();
  return buffer;
}
BufferPtr a_key(Draw& draw) { return integers64(draw, 2, INT64_MIN / 2, INT64_MAX / 2); }

std::string null_op(Draw& draw) {
  const Dtype t = any_dtype(draw);
  const int64_t n = draw.size();
  const BufferPtr x = numbers(draw, t, n, 0, 1), out = room(draw, n, t);
  const auto args = [&](bool host) { return NullArgs{{at(x, host), t}, {at(out, host), t}, {n, n}}; };
  null_cpu(args(true), 0, n);
  launched(null_cuda(args(false), nullptr), "null");
  return out->difference(t);
}

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
    return MomentumStepArgs{c.args<SignStepArgs>(host), at(momentum, host), reinterpret_cast<double*>(sums.on(host)), 0.9};
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
    return RandomStepArgs{{at(x, host), t}, {at(fresh ? fresh : x, host), ot}, ints(key, host), ints(index, host),
                          {at(eps, host), 8 / 255.}, noise, -far, 1 + far, {n, inner}, {channels, spatial}};
  };
  random_step_cpu(args(true), 0, n);
  launched(random_step_cuda(args(false), nullptr), "random_step");
  return (fresh ? fresh : x)->difference(ot);
}

std::string bias_act(Draw& draw) {
  const Dtype t = any_float(draw);
  const int64_t channels = draw.one_of<int64_t>({1, 3, 5, 8, 16, 64}), run = draw.once_in(2) ? 1 : 1 + draw.size() / 8;
  const int64_t n = channels * run * draw.between(1, 5);
  const BufferPtr x = numbers(draw, t, n, -1, 1), residual = draw.once_in(2) ? numbers(draw, t, n, -1, 1) : nullptr;
  const BufferPtr bias = draw.once_in(4) ? nullptr : numbers(draw, wide_of(t), channels, -1, 1);
  const BufferPtr fresh = draw.once_in(3) ? nullptr : room(draw, n, t), grad = numbers(draw, t, n, -1, 1);
  const bool masked = !draw.once_in(5);
  Buffer mask(mask_bytes(n), 0);
  const Act act = Act(draw.below(3));
  const auto bits = [&](bool host) { return reinterpret_cast<uint8_t*>(mask.on(host)); };
  const auto args = [&](bool host) {
    return BiasActArgs{{at(x, host), t}, {at(residual, host), t}, at(bias, host), {at(fresh ? fresh : x, host), t},
                       masked ? bits(host) : nullptr, n, channels, run, act, -0.1, 0.7, 0.01};
  };
  const auto back = [&](bool host) {
    return ActGradArgs{{at(grad, host), t}, bits(host), {at(grad, host), t}, n, act == Act::leaky_relu, 0.01};
  };
  bias_act_cpu(args(true), 0, mask_blocks(n));
  launched(bias_act_cuda(args(false), nullptr), "bias_act");
  const std::string problem = (fresh ? fresh : x)->difference(t);
  if (!problem.empty() || !masked) return problem;
  act_grad_cpu(back(true), 0, mask_blocks(n));
  launched(act_grad_cuda(back(false), nullptr), "act_grad");
  const std::string wrong = grad->difference(t);
  return wrong.empty() ? mask.difference(Dtype::u8) : wrong;
}

std::string model_entry(Draw& draw) {
  const bool wide = draw.once_in(4), backward = draw.once_in(2), clamp = draw.once_in(2), with_delta = draw.once_in(2);
  const Dtype st = wide ? Dtype::f64 : Dtype::f32;
  const Dtype xt = any_dtype(draw), dt = any_float(draw), gt = any_float(draw), ot = any_float(draw);
  const int64_t channels = draw.one_of<int64_t>({1, 3, 3, 2, 5}), spatial = 1 + draw.size() / channels;
  const int64_t batch = draw.between(1, 40) * 400 / (400 + spatial) + 1, n = batch * channels * spatial;
  const BufferPtr x = numbers(draw, xt, n, -0.2, 1.2), d = numbers(draw, dt, n, -0.3, 0.3), g = numbers(draw, gt, n, -1, 1);
  const BufferPtr mean = numbers(draw, st, channels, 0.3, 0.6, false), std = numbers(draw, st, channels, 0.2, 0.4, false);
  const BufferPtr out = room(draw, n, ot);
  bool last[3];
  for (bool& l : last) l = draw.once_in(2);
  const bool image = !backward || clamp;
  const auto args = [&](bool host) {
    ModelEntryArgs a;
    if (image) a.x = {{at(x, host), xt}, backward ? last[2] : last[0]};  // the op asks for this
    if (image && with_delta) a.delta = {{at(d, host), dt}, last[1]};
    if (backward) a.grad = {{at(g, host), gt}, last[1]};
    a.out = {at(out, host), ot};
    a.out_last = last[2];
    a.wide = wide;
    a.mean = at(mean, host);
    a.std = at(std, host);
    a.clamp = clamp;
    a.batch = batch;
    a.channels = channels;
    a.spatial = spatial;
    return a;
  };
  (backward ? model_entry_grad_cpu : model_entry_cpu)(args(true), 0, batch * spatial);
  launched((backward ? model_entry_grad_cuda : model_entry_cuda)(args(false), nullptr), "model_entry");
  return out->difference(ot);
}

std::string keys(Draw& draw) {
  const BufferPtr key = a_key(draw);
  const int64_t n = draw.between(1, 700);
  if (draw.once_in(2)) {
    Buffer out(16 * n, 0);
    const auto args = [&](bool host) { return SplitKeyArgs{ints(key, host), reinterpret_cast<int64_t*>(out.on(host)), n}; };
    split_key_cpu(args(true));
    launched(split_key_cuda(args(false), nullptr), "split_key");
    return out.difference(Dtype::u8);
  }
  const BufferPtr index = draw.once_in(2) ? integers64(draw, n, 0, INT64_MAX / 2) : nullptr;
  Buffer out(4 * n, 0);
  const EpsDist dist = EpsDist(draw.below(3));
  const auto args = [&](bool host) {
    return SampleEpsArgs{reinterpret_cast<float*>(out.on(host)), n, ints(key, host), ints(index, host), dist,
                         16 / 255., 8 / 255., std::erf(std::sqrt(2.0))};
  };
  sample_eps_cpu(args(true));
  launched(sample_eps_cuda(args(false), nullptr), "sample_eps");
  // Two libraries' log() may differ in a double's last place, and so the float by one spacing, rarely.
  return dist == EpsDist::truncated_normal ? "" : out.difference(Dtype::f32);
}

std::string logit_grad(Draw& draw) {
  const Dtype t = any_float(draw), wide = wide_of(t);
  const int64_t members = draw.one_of<int64_t>({1, 2, 3, 5, 9}), batch = draw.between(1, 4);
  const int32_t classes = int32_t(draw.once_in(12) ? draw.between(1000, 30000) : draw.between(1, 300));
  const int64_t n = members * batch * classes;
  const BufferPtr logits = numbers(draw, t, n, -8, 8, draw.once_in(4)), grad = room(draw, n, t);
  const BufferPtr given = draw.once_in(4) ? nullptr : integers64(draw, batch, -1, classes);
  const BufferPtr weights = draw.once_in(2) ? numbers(draw, wide, members, 0, 1, false) : nullptr, key = a_key(draw);
  const BufferPtr index = draw.once_in(2) ? integers64(draw, batch, 0, INT64_MAX / 2) : nullptr;
  Buffer labels(8 * batch, 0), losses(size_of(wide) * batch, 0), scales(size_of(wide) * batch, 0);
  LogitGradArgs a;
  a.members = members;
  a.batch = batch;
  a.classes = classes;
  a.rule = Rule(draw.below(classes < 2 ? 3 : 4));  // a random class, two
  a.loss = Loss(draw.below(classes < 3 ? 2 : 3));  // dlr wants three classes
  a.fuse = members == 1 ? Fuse::logits : Fuse(draw.below(3));
  a.targeted = draw.once_in(2);
  a.rescale = draw.once_in(2);
  a.kappa = draw.one_of({0.0, 1.0});
  const auto args = [&](bool host) {
    LogitGradArgs c = a;
    c.logits = {at(logits, host), t};
    c.grad = {at(grad, host), t};
    c.given = ints(given, host);
    c.labels = reinterpret_cast<int64_t*>(labels.on(host));
    c.losses = losses.on(host);
    c.scales = scales.on(host);
    c.weights = at(weights, host);
    c.key = ints(key, host);
    c.index = ints(index, host);
    return c;
  };
  logit_grad_cpu(args(true), 0, batch);
  launched(logit_grad_cuda(args(false), nullptr), "logit_grad");
  const std::string wrong[] = {labels.difference(Dtype::u8), scales.difference(wide), losses.difference(wide), grad->difference(t)};
  const char* names[] = {"labels: ", "scales: ", "losses: ", "grad: "};
  for (int k = 0; k < 4; ++k)
    if (!wrong[k].empty())
      return names[k] + wrong[k] + " (dtype " + std::to_string(int(t)) + ", members " + std::to_string(members) + ", classes " +
             std::to_string(classes) + ", fuse " + std::to_string(int(a.fuse)) + ", loss " + std::to_string(int(a.loss)) + ")";
  return "";
}

// Small integers, whose sums are exact.
BufferPtr whole(Draw& draw, Dtype t, int64_t n) {
  auto b = std::make_unique<Buffer>(n * size_of(t), draw.once_in(3) ? size_of(t) * draw.below(8) : 0);
  for (int64_t i = 0; i < n; ++i) put(b->on(true) + i * size_of(t), t, double(draw.between(-3, 3)));
  b->upload();
  return b;
}

std::string ensemble_linear(Draw& draw) {
  const Dtype t = draw.one_of({Dtype::f32, Dtype::f16, Dtype::bf16});
  LinearArgs a;
  a.members = draw.between(1, 4);
  a.batch = int32_t(draw.between(1, 140));
  a.cols = int32_t(draw.once_in(2) ? 8 * draw.between(1, 20) : draw.between(1, 150));
  a.inner = int32_t(draw.once_in(2) ? 8 * draw.between(1, 20) : draw.between(0, 300));
  a.turned = draw.once_in(2);
  a.shared = !a.turned && draw.once_in(2);
  a.reduce = a.turned && draw.once_in(2);
  const bool bias = !a.turned && draw.once_in(2), act = !a.turned && draw.once_in(2), keep = a.turned && draw.once_in(2);
  const int64_t rows = a.members * a.batch, out_rows = a.reduce ? a.batch : rows;
  const BufferPtr x = whole(draw, t, (a.shared ? a.batch : rows) * a.inner), w = whole(draw, t, a.members * a.cols * a.inner);
  const BufferPtr b = whole(draw, t, a.members * a.cols), kept = random_bytes(draw, rows * bytes_of(a.inner));
  const BufferPtr out = room(draw, out_rows * a.cols, t);
  Buffer mask(out_rows * bytes_of(a.cols), 0);
  const auto args = [&](bool host) {
    LinearArgs c = a;
    c.a = {at(x, host), t};
    c.b = {at(w, host), t};
    if (bias) c.bias = {at(b, host), t};
    c.out = {at(out, host), t};
    if (act) c.mask = reinterpret_cast<uint8_t*>(mask.on(host));
    if (keep) c.keep = reinterpret_cast<const uint8_t*>(at(kept, host));
    return c;
  };
  ensemble_linear_cpu(args(true), 0, linear_blocks(args(true)));
  launched(ensemble_linear_cuda(args(false), nullptr), "ensemble_linear");
  const std::string problem = out->difference(t);
  return problem.empty() && act ? mask.difference(Dtype::u8) : problem;
}

std::string ensemble_linear_act(Draw& draw) {
  const Dtype t = draw.one_of({Dtype::f32, Dtype::f16, Dtype::bf16});
  const int64_t batch = draw.between(1, 6), rows = batch * draw.between(1, 4);
  const int32_t cols = int32_t(draw.size() % 1200 + 1);
  const bool keep = draw.once_in(3), bias = !keep && draw.once_in(2), act = !keep && draw.once_in(2);
  const BufferPtr a = numbers(draw, t, rows * cols, -1, 1), b = numbers(draw, t, rows / batch * cols, -1, 1);
  const BufferPtr out = numbers(draw, t, rows * cols, -1, 1), kept = random_bytes(draw, rows * bytes_of(cols));
  Buffer mask(rows * bytes_of(cols), 0);
  const auto args = [&](bool host) {
    LinearActArgs c;
    c.out = {at(out, host), t};
    c.rows = rows;
    c.batch = batch;
    c.cols = cols;
    if (bias) c.bias = {at(b, host), t};
    if (act) c.mask = reinterpret_cast<uint8_t*>(mask.on(host));
    if (keep) c.a = {at(a, host), t};
    if (keep) c.keep = reinterpret_cast<const uint8_t*>(at(kept, host));
    return c;
  };
  ensemble_linear_act_cpu(args(true), 0, rows);
  launched(ensemble_linear_act_cuda(args(false), nullptr), "ensemble_linear_act");
  const std::string problem = out->difference(t);
  return problem.empty() && act ? mask.difference(Dtype::u8) : problem;
}

using Case = std::string (*)(Draw&);
const std::pair<const char*, Case> kCases[] = {
    {"null", null_op}, {"sign_step", sign_step}, {"momentum_step", momentum_step}, {"l2_step", l2_step},
    {"random_step", random_step}, {"bias_act", bias_act}, {"model_entry", model_entry}, {"keys", keys},
    {"logit_grad", logit_grad}, {"ensemble_linear", ensemble_linear}, {"ensemble_linear_act", ensemble_linear_act}};

int run(uint32_t seed, uint32_t count, const std::string& only) {
  int devices = 0, failed = 0;
  must(int(cudaGetDeviceCount(&devices)), "cudaGetDeviceCount");
  uint32_t calls = 0;
  for (uint32_t k = seed; calls < count; ++k) {
    Draw draw(k);
    const auto& [name, body] = kCases[draw.below(int64_t(std::size(kCases)))];
    if (!only.empty() && only != name) continue;
    must(int(cudaSetDevice(int(draw.below(devices)))), "cudaSetDevice");
    ++calls;
    const std::string problem = body(draw);
    if (problem.empty()) continue;
    ++failed;
    printf("FAILED %s, seed %u: %s\n", name, k, problem.c_str());
    fflush(stdout);
  }
  printf("%u calls, %d failed\n", calls, failed);
  return failed ? 1 : 0;
}

}  // namespace
}  // namespace ensadv

int main(int argc, char** argv) {
  if (argc < 3) return fprintf(stderr, "fuzz SEED COUNT [OP]\n"), 2;
  return ensadv::run(uint32_t(strtoul(argv[1], nullptr, 10)), uint32_t(strtoul(argv[2], nullptr, 10)), argc > 3 ? argv[3] : "");
}
