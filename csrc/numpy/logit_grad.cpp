#include "../kernels/logit_grad.h"

#include "arrays.h"

namespace ensadv {
namespace {

int32_t position(const std::string& name, const char* what, std::initializer_list<const char*> names) {
  const auto found = std::find(names.begin(), names.end(), name);
  require(found != names.end(), what);
  return int32_t(found - names.begin());
}

void* per_row(const char* what, Array& array, int64_t n, Dtype dtype) {
  require(array.size() == n && array.dtype == (dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32), what);
  return array.out().data;
}

void logit_grad(const Array& logits, Array& grad, Dense<int64_t>& labels, Array& losses, Array& scales,
                int64_t members, int64_t classes, const std::string& rule, const std::string& loss,
                const std::string& fuse, const std::optional<Dense<int64_t>>& given, Array* weights,
                const std::optional<Dense<int64_t>>& key, const std::optional<Dense<int64_t>>& index, bool targeted,
                bool rescale, double kappa, const Range& range) {
  require(members > 0 && classes > 0 && logits.size() % (members * classes) == 0, "no such members and classes");
  require(logits.dtype == grad.dtype && logits.dtype != Dtype::u8 && grad.size() == logits.size(),
          "grad must be like logits, of a float dtype");
  LogitGradArgs args;
  args.logits = logits.in();
  args.grad = grad.out();
  args.members = members;
  args.batch = logits.size() / (members * classes);
  args.classes = int32_t(classes);
  args.rule = Rule(position(rule, "no such rule", {"given", "predicted", "least_likely", "random"}));
  args.loss = Loss(position(loss, "no such loss", {"ce", "cw", "dlr"}));
  args.fuse = Fuse(position(fuse, "no such fuse", {"logits", "probs", "loss"}));
  require(args.loss != Loss::dlr || classes >= 3, "dlr needs at least 3 classes");
  require(args.rule != Rule::random || key, "rule random needs a key");
  require(labels.size() == args.batch, "one label per sample is wanted");
  args.labels = labels.mutable_data();
  args.given = index_data(given, args.batch);
  args.losses = per_row("one loss per sample is wanted", losses, args.batch, logits.dtype);
  args.scales = per_row("one scale per sample is wanted", scales, args.batch, logits.dtype);
  if (weights) args.weights = per_row("one weight per member is wanted", *weights, members, logits.dtype);
  if (key) args.key = key_data(*key);
  args.index = index_data(index, args.batch);
  args.targeted = targeted;
  args.rescale = rescale;
  args.kappa = kappa;
  run(range, args.batch, [&](int64_t begin, int64_t end) { logit_grad_cpu(args, begin, end); });
}

}  // namespace

void bind_logit_grad(py::module_& m) {
  m.def("logit_grad", &logit_grad, py::arg("logits"), py::arg("grad"), py::arg("labels").noconvert(),
        py::arg("losses"), py::arg("scales"), py::kw_only(), py::arg("members"), py::arg("classes"),
        py::arg("rule") = "given", py::arg("loss") = "ce", py::arg("fuse") = "logits",
        py::arg("given").noconvert() = py::none(), py::arg("weights") = py::none(), py::arg("key") = py::none(),
        py::arg("index").noconvert() = py::none(), py::arg("targeted") = false, py::arg("rescale") = true,
        py::arg("kappa") = 0.0, py::arg("range") = Range{});
}

}  // namespace ensadv
