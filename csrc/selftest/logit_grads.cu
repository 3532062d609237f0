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

// Elements of any dtype, read and written as doubles.
std::vector<double> numbers(const char* data, Dtype dtype, int64_t n) {
  std::vector<double> result;
  for (int64_t i = 0; i < n; ++i) {
    switch (dtype) {
      case Dtype::f32: result.push_back(reinterpret_cast<const float*>(data)[i]); break;
      case Dtype::f16: result.push_back(to_compute(reinterpret_cast<const half_t*>(data)[i])); break;
      case Dtype::bf16: result.push_back(to_compute(reinterpret_cast<const bfloat_t*>(data)[i])); break;
      default: result.push_back(reinterpret_cast<const double*>(data)[i]); break;
    }
  }
  return result;
}
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

// A twin's two sides as doubles.
struct Both {
  std::vector<double> cpu, cuda;

  Both(Twin& t, Dtype dtype, int64_t n)
      : cpu(numbers(t.host(), dtype, n)), cuda(numbers(t.download().data(), dtype, n)) {}
};

std::string show(const std::string& what, double cuda, double cpu) {
  return what + ": CUDA " + std::to_string(cuda) + ", CPU " + std::to_string(cpu);
}

// The gradients of sample b, where `moved` is the quotient of the scales.
std::string gradient_difference(const LogitCase& c, const Both& grad, int64_t b, double moved) {
  const double eps = c.dtype == Dtype::f16 ? 0x1p-10 : c.dtype == Dtype::bf16 ? 0x1p-7 : 0.0;
  for (int64_t k = 0; k < c.members; ++k) {
    const size_t first = size_t((k * kBatch + b) * c.classes);
    double largest = 0.0;
    for (int32_t j = 0; j < c.classes; ++j) largest = std::fmax(largest, std::abs(grad.cpu[first + j]));
    for (int32_t j = 0; j < c.classes; ++j) {
      const double p = grad.cpu[first + j] * moved, q = grad.cuda[first + j];
      if (std::isnan(p) != std::isnan(q) || std::abs(p - q) > (eps + 1e-5) * std::fmax(moved, 1.0) * largest)
        return show("gradient of sample " + std::to_string(b) + ", class " + std::to_string(j), q, p);
    }
  }
  return "";
}

// Sums run in another order on the GPU: labels are equal, the rest is close. Where rounding moved a scale to the next
// power of two, the gradient moved with it.
std::string difference(Harness& harness, const LogitCase& c) {
  LogitData data(c);
  logit_grad_cpu(data.arguments(c, Side::host), 0, kBatch);
  harness.must_finish(logit_grad_cuda(data.arguments(c, Side::device), harness.stream()), "logit_grad");
  const std::vector<char> labels = data.labels.download();
  if (memcmp(labels.data(), data.labels.host(), labels.size())) return "labels differ";
  const Both scale(data.scales, c.compute(), kBatch), loss(data.losses, c.compute(), kBatch);
  const Both grad(data.grad, c.dtype, c.numel());
  for (int64_t b = 0; b < kBatch; ++b) {
    const double moved = scale.cuda[size_t(b)] / scale.cpu[size_t(b)];
    if (moved != 1.0 && moved != 0.5 && moved != 2.0) return "scale of sample " + std::to_string(b);
    const double cpu = loss.cpu[size_t(b)], cuda = loss.cuda[size_t(b)];
    if (std::isnan(cpu) != std::isnan(cuda) || std::abs(cpu - cuda) > 1e-4 + 1e-5 * std::abs(cpu))
      return show("loss of sample " + std::to_string(b), cuda, cpu);
    const std::string problem = gradient_difference(c, grad, b, moved);
    if (!problem.empty()) return problem;
  }
  return "";
}

void check_logit_grad(Harness& harness, LogitCase c) {
  std::string problem;
  for (int32_t classes : {3, 10, 33, 1000, 1001, 2048, 12000, 30000, 70000})
    for (Rule rule : {Rule::given, Rule::random, Rule::predicted, Rule::least_likely})
      // Among many mixed probabilities two may lie within a rounding error of each other.
      if (problem.empty() && (rule == Rule::given || c.fuse == Fuse::logits || classes < 99)) {
        c.classes = classes;
        c.rule = rule;
        problem = difference(harness, c);
        if (!problem.empty()) problem = std::to_string(classes) + " classes: " + problem;
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
