#include <tuple>

#include "../kernels/logit_grad.h"
#include "harness.h"

namespace ensadv::selftest {
namespace {

constexpr int64_t kBatch = 6;

struct LogitCase {
  Dtype dtype;
  int64_t members;
  Fuse fuse;
  Loss loss;
  int32_t classes = 0;
  Rule rule = Rule::given;

  Dtype compute() const { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
  int64_t numel() const { return members * kBatch * classes; }
};

// Stores v as an element of any dtype.
void set_number(Twin& twin, Dtype dtype, int64_t i, double v) {
  switch (dtype) {
    case Dtype::f32: data_as<float>(twin, Side::host)[i] = float(v); break;
    case Dtype::f16: data_as<half_t>(twin, Side::host)[i] = narrow<half_t>(v); break;
    case Dtype::bf16: data_as<bfloat_t>(twin, Side::host)[i] = narrow<bfloat_t>(v); break;
    default: data_as<double>(twin, Side::host)[i] = v; break;
  }
}

// The tensors of one call.
struct LogitData {
  Twin logits, grad, labels, given, losses, scales;
  TwinPtr key = key_of(11, 12);

  explicit LogitData(const LogitCase& c)
      : logits(c.numel() * size_of(c.dtype), 0), grad(c.numel() * size_of(c.dtype), 0), labels(kBatch * 8, 0),
        given(kBatch * 8, 0), losses(kBatch * size_of(c.compute()), 0), scales(kBatch * size_of(c.compute()), 0) {
    std::minstd_rand random{uint32_t(c.classes)};
    for (int64_t i = 0; i < c.numel(); ++i) set_number(logits, c.dtype, i, double(random() % 2001) / 100 - 10);
    set_number(logits, c.dtype, c.numel() - 1, kNan);  // in the last sample
    logits.upload();
    for (int64_t b = 0; b < kBatch; ++b) data_as<int64_t>(given, Side::host)[b] = b == 1 ? -1 : 7919 * b % c.classes;
    given.upload();
  }

  LogitGradArgs arguments(const LogitCase& c, Side side) {
    LogitGradArgs a;
    a.logits = {data_of(logits, side), c.dtype};
    a.grad = out_of(grad, c.dtype, side);
    a.given = data_as<const int64_t>(given, side);
    a.labels = data_as<int64_t>(labels, side);
    a.losses = data_of(losses, side);
    a.scales = data_of(scales, side);
    a.key = ints_of(key, side);
    a.members = c.members;
    a.batch = kBatch;
    a.classes = c.classes;
    a.rule = c.rule;
    a.loss = c.loss;
    a.fuse = c.fuse;
    a.kappa = 1.0;
    return a;
  }
};

std::string difference(Harness& harness, const LogitCase& c) {
  LogitData data(c);
  logit_grad_cpu(data.arguments(c, Side::host), 0, kBatch);
  harness.must_finish(logit_grad_cuda(data.arguments(c, Side::device), harness.stream()), "logit_grad");
  for (const auto& [what, twin, dtype] :
       {std::tuple("labels: ", &data.labels, Dtype::u8), std::tuple("scales: ", &data.scales, c.compute()),
        std::tuple("losses: ", &data.losses, c.compute()), std::tuple("grad: ", &data.grad, c.dtype)}) {
    const std::string problem = twin->difference(dtype);
    if (!problem.empty()) return what + problem;
  }
  return "";
}

void check_logit_grad(Harness& harness, LogitCase c) {
  std::string problem;
  for (int32_t classes : {3, 10, 33, 1000, 1001, 2048, 12000, 30000, 70000}) {
    // Of rows that shared memory cannot hold one size is enough.
    if (size_t(classes) * sizeof(float) > 2 * harness.device().sharedMemPerBlockOptin) continue;
    for (Rule rule : {Rule::given, Rule::random, Rule::predicted, Rule::least_likely})
      if (problem.empty() && (rule == Rule::given || c.fuse == Fuse::logits || classes < 99)) {
        c.classes = classes;
        c.rule = rule;
        problem = difference(harness, c);
        if (!problem.empty()) problem = std::to_string(classes) + " classes: " + problem;
      }
  }
  harness.note(std::string("logit_grad ") + name_of(c.dtype) + ", " + std::to_string(c.members) + " members, fuse " +
                   std::to_string(int(c.fuse)) + ", loss " + std::to_string(int(c.loss)),
               problem);
}

}  // namespace

void check_logit_grads(Harness& harness) {
  for (Dtype dtype : kFloats)
    for (int64_t members : {1, 3, 5})
      for (Fuse fuse : {Fuse::logits, Fuse::probs, Fuse::loss})
        for (Loss loss : {Loss::ce, Loss::cw, Loss::dlr}) check_logit_grad(harness, {dtype, members, fuse, loss});
}

}  // namespace ensadv::selftest
