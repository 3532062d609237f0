#include "../kernels/logit_grad.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common.h"

namespace ensadv::ops {
namespace {

void* per_row(const char* op, const char* name, const Tensor& t, int64_t n, const Tensor& logits) {
  const auto wanted = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n && t.is_contiguous() && t.scalar_type() == wanted &&
                      t.device() == logits.device(),
                  op, ": ", name, " must be a contiguous [", n, "] tensor on logits' device, float32 (float64 for ",
                  "float64 logits)");
  return t.data_ptr();
}

void logit_grad(const Tensor logits, const std::optional<Tensor> given, const std::optional<Tensor> weights,
                const std::optional<Tensor> key, const std::optional<Tensor> index, int64_t rule, int64_t loss_kind,
                int64_t fuse, bool targeted, double kappa, bool rescale, const Tensor grad, const Tensor labels,
                const Tensor loss, const Tensor scale) {
  constexpr const char* op = "logit_grad";
  const int64_t dim = logits.dim();
  STD_TORCH_CHECK((dim == 2 || dim == 3) && logits.is_contiguous() && grad.is_contiguous(), op,
                  ": logits and grad must be contiguous [batch, classes] or [members, batch, classes] tensors");
  check_like(op, "grad", grad, logits);
  check_apart(op, "grad", grad, "logits", logits);
  const int64_t members = dim == 2 ? 1 : logits.size(0), batch = logits.size(dim - 2), classes = logits.size(dim - 1);
  constexpr int64_t kMaxExtent = std::numeric_limits<int32_t>::max() - 4096;  // indices run a little beyond the end
  STD_TORCH_CHECK(members >= 1 && classes >= 1 && classes <= kMaxExtent && batch <= kMaxExtent, op, ": unsupported shape");
  STD_TORCH_CHECK(rule >= 0 && rule <= int64_t(Rule::random), op, ": unknown rule");
  STD_TORCH_CHECK(loss_kind >= 0 && loss_kind <= int64_t(Loss::dlr), op, ": unknown loss");
  STD_TORCH_CHECK(fuse >= 0 && fuse <= int64_t(Fuse::loss), op, ": unknown fuse");
  STD_TORCH_CHECK(Loss(loss_kind) != Loss::dlr || classes >= 3, op, ": dlr needs at least 3 classes");
  STD_TORCH_CHECK(Rule(rule) != Rule::random || (key && classes >= 2), op,
                  ": rule random needs a key and at least 2 classes");
  LogitGradArgs args;
  args.logits = in_ref(op, logits);
  args.grad = out_ref(op, grad);
  STD_TORCH_CHECK(args.logits.dtype == args.grad.dtype && args.grad.dtype != Dtype::u8, op,
                  ": grad must have logits' dtype, a float one");
  if (given) {
    args.given = int64_data(op, "given", *given, batch, logits);
    STD_TORCH_CHECK(all_readable<int64_t>(*given, [=](int64_t y) { return y >= 0 && y < classes; }), op,
                    ": labels must lie in [0, ", classes, ")");
  }
  args.labels = const_cast<int64_t*>(int64_data(op, "labels", labels, batch, logits));
  args.losses = per_row(op, "loss", loss, batch, logits);
  args.scales = per_row(op, "scale", scale, batch, logits);
  if (weights) {
    args.weights = per_row(op, "weights", *weights, members, logits);
    double total = 0.0;
    const auto good = [&total](double w) { return w >= 0.0 && (total += w) < INFINITY; };
    const bool is_double = args.logits.dtype == Dtype::f64;
    const bool all = is_double ? all_readable<double>(*weights, good) : all_readable<float>(*weights, good);
    STD_TORCH_CHECK(all && (total > 0.0 || logits.is_cuda()), op, ": weights must be >= 0, finite and not all 0");
  }
  if (key) args.key = int64_data(op, "key", *key, 2, logits);
  args.index = index_data(op, index, batch, logits);
  args.members = members;
  args.batch = batch;
  args.classes = int32_t(classes);
  args.rule = Rule(rule);
  args.loss = Loss(loss_kind);
  args.fuse = Fuse(fuse);
  args.targeted = targeted;
  args.rescale = rescale;
  args.kappa = kappa;
  if (batch == 0) return;
  if (logits.is_cuda()) {
    on_cuda(op, logits, [&](void* stream) { return logit_grad_cuda(args, stream); });
  } else {
    on_cpu(batch, [&](int64_t begin, int64_t end) { logit_grad_cpu(args, begin, end); },
           std::max<int64_t>(1, kGrain / (members * classes)));
  }
}

ENSADV_OP(logit_grad,
          "(Tensor logits, Tensor? given, Tensor? weights, Tensor? key, Tensor? index, int rule, int loss_kind, "
          "int fuse, bool targeted, float kappa, bool rescale, Tensor(a!) grad, Tensor(b!) labels, "
          "Tensor(c!) loss, Tensor(d!) scale) -> ()")

}  // namespace
}  // namespace ensadv::ops
