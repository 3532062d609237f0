#include "../kernels/logit_grad.h"
#include "fuzz.h"

namespace ensadv {

namespace {

LogitGradArgs modes(Draw& draw) {
  LogitGradArgs a;
  a.members = draw.one_of<int64_t>({1, 2, 3, 5, 9});
  a.batch = draw.between(1, 4);
  a.classes = int32_t(draw.once_in(12) ? draw.between(1000, 30000) : draw.between(1, 300));
  a.rule = Rule(draw.below(a.classes < 2 ? 3 : 4));  // a random class, two
  a.loss = Loss(draw.below(a.classes < 3 ? 2 : 3));  // dlr wants three classes
  a.fuse = a.members == 1 ? Fuse::logits : Fuse(draw.below(3));
  a.targeted = draw.once_in(2);
  a.rescale = draw.once_in(2);
  a.kappa = draw.one_of({0.0, 1.0});
  return a;
}

std::string text_of(const LogitGradArgs& a, Dtype t) {
  const auto part = [](const char* name, int64_t v) { return std::string(name) + std::to_string(v); };
  return part(" (dtype ", int(t)) + part(", members ", a.members) + part(", classes ", a.classes) +
         part(", fuse ", int(a.fuse)) + part(", loss ", int(a.loss)) + ")";
}

}  // namespace

std::string logit_grad(Draw& draw) {
  const Dtype t = any_float(draw), wide = wide_of(t);
  const LogitGradArgs a = modes(draw);
  const int64_t n = a.members * a.batch * a.classes;
  const BufferPtr logits = numbers(draw, t, n, -8, 8, draw.once_in(4)), grad = room(draw, n, t);
  const BufferPtr given = draw.once_in(4) ? nullptr : integers64(draw, a.batch, -1, a.classes);
  const BufferPtr weights = draw.once_in(2) ? numbers(draw, wide, a.members, 0, 1, false) : nullptr;
  const BufferPtr index = draw.once_in(2) ? integers64(draw, a.batch, 0, INT64_MAX / 2) : nullptr, key = a_key(draw);
  Buffer labels(8 * a.batch, 0), losses(size_of(wide) * a.batch, 0), scales(size_of(wide) * a.batch, 0);
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
  logit_grad_cpu(args(true), 0, a.batch);
  launched(logit_grad_cuda(args(false), nullptr), "logit_grad");
  const std::string wrong[] = {labels.difference(Dtype::u8), scales.difference(wide), losses.difference(wide),
                               grad->difference(t)};
  const char* names[] = {"labels: ", "scales: ", "losses: ", "grad: "};
  for (int k = 0; k < 4; ++k)
    if (!wrong[k].empty()) return names[k] + wrong[k] + text_of(a, t);
  return "";
}

}  // namespace ensadv
