#include "../kernels/ensemble_linear.h"

#include "arrays.h"

namespace ensadv {
namespace {

using Mask = std::optional<Dense<uint8_t>>;

uint8_t* mask_data(Mask& mask, int64_t rows, int64_t cols) {
  if (!mask) return nullptr;
  require(mask->size() == rows * mask_bytes(cols), "the mask must hold whole bytes for each row");
  return mask->mutable_data();
}

void ensemble_linear(const Array& a, const Array& b, Array& out, int64_t members, int64_t batch, int64_t cols,
                     int64_t inner, const Array* bias, Mask mask, Mask keep, bool shared, bool inner_first, bool reduce,
                     bool tiles, const Range& range) {
  require(a.size() == (shared ? 1 : members) * batch * inner && b.size() == members * cols * inner &&
              out.size() == (reduce ? 1 : members) * batch * cols && (!bias || bias->size() == members * cols),
          "sizes do not fit together");
  require(a.dtype == out.dtype && b.dtype == out.dtype && (!bias || bias->dtype == out.dtype), "one dtype is wanted");
  LinearArgs args;
  args.a = a.in();
  args.b = b.in();
  if (bias) args.bias = bias->in();
  args.out = out.out();
  args.mask = mask_data(mask, members * batch, cols);
  args.keep = mask_data(keep, members * batch, inner);
  args.members = members;
  args.batch = int32_t(batch);
  args.cols = int32_t(cols);
  args.inner = int32_t(inner);
  args.shared = shared;
  args.inner_first = inner_first;
  args.reduce = reduce;
  const auto kernel = tiles ? &ensadv::ensemble_linear_cpu : &ensadv::ensemble_linear_plain_cpu;
  run(range, linear_blocks(args), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void ensemble_linear_act(Array& out, int64_t members, int64_t cols, const Array* a, const Array* bias, Mask mask,
                         Mask keep, const Range& range) {
  require(members > 0 && cols > 0 && out.size() % (members * cols) == 0 && (!a || a->size() == out.size()) &&
              (!bias || bias->size() == members * cols) && !a == !keep && !(keep && (bias || mask)),
          "sizes do not fit together");
  LinearActArgs args;
  args.rows = out.size() / cols;
  args.batch = args.rows / members;
  args.cols = int32_t(cols);
  args.out = out.out();
  if (a) args.a = a->in();
  if (bias) args.bias = bias->in();
  args.mask = mask_data(mask, args.rows, cols);
  args.keep = mask_data(keep, args.rows, cols);
  run(range, args.rows, [&](int64_t begin, int64_t end) { ensemble_linear_act_cpu(args, begin, end); });
}

}  // namespace

void bind_ensemble_linear(py::module_& m) {
  const auto mask = py::arg("mask").noconvert() = py::none(), keep = py::arg("keep").noconvert() = py::none();
  m.attr("LINEAR_BLOCK") = kLinearBlock;
  m.def("ensemble_linear", &ensemble_linear, py::arg("a"), py::arg("b"), py::arg("out"), py::kw_only(),
        py::arg("members"), py::arg("batch"), py::arg("cols"), py::arg("inner"), py::arg("bias") = py::none(), mask,
        keep, py::arg("shared") = false, py::arg("inner_first") = false, py::arg("reduce") = false,
        py::arg("tiles") = true, py::arg("range") = Range{});
  m.def("ensemble_linear_act", &ensemble_linear_act, py::arg("out"), py::kw_only(), py::arg("members"),
        py::arg("cols"), py::arg("a") = py::none(), py::arg("bias") = py::none(), mask, keep,
        py::arg("range") = Range{});
}

}  // namespace ensadv
