#include "../kernels/logit_grad.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common.h"

namespace ensadv::ops {
namespace {

void* compute_data(const char* op, const char* name, const Tensor& t, int64_t n, const Tensor& logits) {
  check_dense(op, name, t, {n}, compute_dtype(logits), logits);
  return t.data_ptr();
}

void check_logits(const char* op, const Tensor& logits, const Tensor& grad) {
  const int64_t dim = logits.dim();
  ENSADV_CHECK((dim == 2 || dim == 3) && logits.is_contiguous(), op, "logits must be a contiguous [batch, classes] or ",
               "[members, batch, classes] tensor, got ", described(logits));
  check_floating(op, "logits", logits);
  check_like(op, "grad", grad, logits);
  check_dtype(op, "grad", grad, logits.scalar_type());
  ENSADV_CHECK(grad.is_contiguous(), op, "grad must be contiguous, got ", described(grad));
  check_apart(op, "grad", grad, "logits", logits);
  constexpr int64_t kMaxExtent = std::numeric_limits<int32_t>::max() - 4096;  // indices run a little beyond the end
  const int64_t members = dim == 2 ? 1 : logits.size(0), batch = logits.size(dim - 2), classes = logits.size(dim - 1);
  ENSADV_CHECK(members >= 1 && classes >= 1 && classes <= kMaxExtent && batch <= kMaxExtent, op, "logits must have a ",
               "member, a class and at most ", kMaxExtent, " samples and classes, got ", shape_of(logits));
}

void check_weights(const char* op, const Tensor& weights, bool readable) {
  double total = 0.0;
  const auto bad = find_bad_number(weights, [&total](double w) { return w >= 0.0 && (total += w) < INFINITY; });
  ENSADV_CHECK(!bad && (total > 0.0 || !readable), op, "weights must be >= 0, finite and not all 0, got ",
               bad.value_or(0.0));
}

// The integers of the schema as what they stand for.
void set_choices(const char* op, int64_t rule, int64_t loss, int64_t fuse, int64_t classes, bool has_key,
                 LogitGradArgs& args) {
  check_choice(op, "rule", rule, int64_t(Rule::random));
  check_choice(op, "loss_kind", loss, int64_t(Loss::dlr));
  check_choice(op, "fuse", fuse, int64_t(Fuse::loss));
  args.rule = Rule(rule);
  args.loss = Loss(loss);
  args.fuse = Fuse(fuse);
  ENSADV_CHECK(args.loss != Loss::dlr || classes >= 3, op, "logits must have at least 3 classes for loss dlr, got ",
               classes);
  if (args.rule != Rule::random) return;
  ENSADV_CHECK(has_key, op, "key must be given for rule random, got none");
  ENSADV_CHECK(classes >= 2, op, "logits must have at least 2 classes for rule random, got ", classes);
}

void logit_grad(const Tensor logits, const std::optional<Tensor> given, const std::optional<Tensor> weights,
                const std::optional<Tensor> key, const std::optional<Tensor> index, int64_t rule, int64_t loss_kind,
                int64_t fuse, bool targeted, double kappa, bool rescale, const Tensor grad, const Tensor labels,
                const Tensor loss, const Tensor scale) {
  constexpr const char* op = "logit_grad";
  check_logits(op, logits, grad);
  const int64_t dim = logits.dim(), members = dim == 2 ? 1 : logits.size(0);
  const int64_t batch = logits.size(dim - 2), classes = logits.size(dim - 1);
  LogitGradArgs args;
  set_choices(op, rule, loss_kind, fuse, classes, key.has_value(), args);
  args.logits = in_ref(op, "logits", logits);
  args.grad = out_ref(op, "grad", grad);
  if (given) {
    args.given = int64_data(op, "given", *given, batch, logits);
    const int64_t* bad = find_bad<int64_t>(*given, [=](int64_t y) { return y >= 0 && y < classes; });
    ENSADV_CHECK(!bad, op, "given must lie in [0, ", classes, "), got ", *bad);
  }
  args.labels = int64_data(op, "labels", labels, batch, logits);
  args.losses = compute_data(op, "loss", loss, batch, logits);
  args.scales = compute_data(op, "scale", scale, batch, logits);
  if (weights) {
    args.weights = compute_data(op, "weights", *weights, members, logits);
    check_weights(op, *weights, logits.is_cpu());
  }
  if (key) args.key = int64_data(op, "key", *key, 2, logits);
  args.index = index_data(op, index, batch, logits);
  args.members = members;
  args.batch = batch;
  args.classes = int32_t(classes);
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
