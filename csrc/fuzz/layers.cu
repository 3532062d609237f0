#include "../kernels/act_grad.h"
#include "../kernels/bias_act.h"
#include "../kernels/ensemble_linear.h"
#include "../kernels/model_entry.h"
#include "fuzz.h"

namespace ensadv {

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
    return BiasActArgs{{at(x, host), t},
                       {at(residual, host), t},
                       at(bias, host),
                       {at(fresh ? fresh : x, host), t},
                       masked ? bits(host) : nullptr,
                       n,
                       channels,
                       run,
                       act,
                       -0.1,
                       0.7,
                       0.01};
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
  const BufferPtr x = numbers(draw, xt, n, -0.2, 1.2), d = numbers(draw, dt, n, -0.3, 0.3);
  const BufferPtr g = numbers(draw, gt, n, -1, 1), mean = numbers(draw, st, channels, 0.3, 0.6, false);
  const BufferPtr std = numbers(draw, st, channels, 0.2, 0.4, false);
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
    a.out_channels_last = last[2];
    a.in_double = wide;
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

namespace {

// Small integers, whose sums are exact.
BufferPtr whole(Draw& draw, Dtype t, int64_t n) {
  auto b = std::make_unique<Buffer>(n * size_of(t), draw.once_in(3) ? size_of(t) * draw.below(8) : 0);
  for (int64_t i = 0; i < n; ++i) put(b->on(true) + i * size_of(t), t, double(draw.between(-3, 3)));
  b->upload();
  return b;
}

}  // namespace

std::string ensemble_linear(Draw& draw) {
  const Dtype t = draw.one_of({Dtype::f32, Dtype::f16, Dtype::bf16});
  LinearArgs a;
  a.members = draw.between(1, 4);
  a.batch = int32_t(draw.between(1, 140));
  a.cols = int32_t(draw.once_in(2) ? 8 * draw.between(1, 20) : draw.between(1, 150));
  a.inner = int32_t(draw.once_in(2) ? 8 * draw.between(1, 20) : draw.between(0, 300));
  a.inner_first = draw.once_in(2);
  a.shared = !a.inner_first && draw.once_in(2);
  a.reduce = a.inner_first && draw.once_in(2);
  const bool bias = !a.inner_first && draw.once_in(2), act = !a.inner_first && draw.once_in(2);
  const bool keep = a.inner_first && draw.once_in(2);
  const int64_t rows = a.members * a.batch, out_rows = a.reduce ? a.batch : rows;
  const BufferPtr x = whole(draw, t, (a.shared ? a.batch : rows) * a.inner);
  const BufferPtr w = whole(draw, t, a.members * a.cols * a.inner);
  const BufferPtr b = whole(draw, t, a.members * a.cols), kept = random_bytes(draw, rows * mask_bytes(a.inner));
  const BufferPtr out = room(draw, out_rows * a.cols, t);
  Buffer mask(out_rows * mask_bytes(a.cols), 0);
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
  const BufferPtr out = numbers(draw, t, rows * cols, -1, 1), kept = random_bytes(draw, rows * mask_bytes(cols));
  Buffer mask(rows * mask_bytes(cols), 0);
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

}  // namespace ensadv
