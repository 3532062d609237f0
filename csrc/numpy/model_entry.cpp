#include "../kernels/model_entry.h"

#include "arrays.h"

namespace ensadv {
namespace {

Pixels pixels(const Array* array, bool last, const ModelEntryArgs& args) {
  if (!array) return {};
  require(array->size() == args.batch * args.channels * args.spatial, "all images must have one size");
  return {array->in(), last};
}

const void* per_channel(const Array& array, const ModelEntryArgs& args) {
  require(array.size() == args.channels, "one number per channel is wanted");
  require(array.dtype == (args.in_double ? Dtype::f64 : Dtype::f32), "mean and std must both be float32, or float64");
  return array.in().data;
}

ModelEntryArgs arguments(Array& out, const Array& std, int64_t spatial, bool out_last, bool clamp) {
  require(out.dtype != Dtype::u8, "out must be of a float dtype");
  ModelEntryArgs args;
  args.channels = std.size();
  args.spatial = spatial;
  require(args.channels > 0 && spatial > 0 && out.size() % (args.channels * spatial) == 0, "no such images");
  args.batch = out.size() / (args.channels * spatial);
  args.out = out.out();
  args.out_channels_last = out_last;
  args.in_double = std.dtype == Dtype::f64;
  args.std = per_channel(std, args);
  args.clamp = clamp;
  return args;
}

void model_entry(const Array& x, const Array* delta, Array& out, const Array& mean, const Array& std, int64_t spatial,
                 bool x_last, bool delta_last, bool out_last, bool clamp, const Range& range) {
  ModelEntryArgs args = arguments(out, std, spatial, out_last, clamp);
  args.x = pixels(&x, x_last, args);
  args.delta = pixels(delta, delta_last, args);
  args.mean = per_channel(mean, args);
  run(range, args.batch * spatial, [&](int64_t begin, int64_t end) { model_entry_cpu(args, begin, end); });
}

void model_entry_grad(const Array& grad, const Array* x, const Array* delta, Array& out, const Array& std,
                      int64_t spatial, bool grad_last, bool delta_last, bool out_last, bool clamp,
                      const Range& range) {
  ModelEntryArgs args = arguments(out, std, spatial, out_last, clamp);
  require(clamp == bool(x), "x is wanted where there is a clamp");
  args.grad = pixels(&grad, grad_last, args);
  args.x = pixels(x, out_last, args);
  args.x.channels_last = out_last;
  args.delta = pixels(x ? delta : nullptr, delta_last, args);
  run(range, args.batch * spatial, [&](int64_t begin, int64_t end) { model_entry_grad_cpu(args, begin, end); });
}

}  // namespace

void bind_model_entry(py::module_& m) {
  const py::kw_only named;
  const auto delta = py::arg("delta"), out = py::arg("out"), std = py::arg("std"), spatial = py::arg("spatial");
  const auto delta_last = py::arg("delta_last") = false, out_last = py::arg("out_last") = false;
  const auto clamp = py::arg("clamp") = true, range = py::arg("range") = Range{};
  m.def("model_entry", &model_entry, py::arg("x"), delta, out, py::arg("mean"), std, spatial, named,
        py::arg("x_last") = false, delta_last, out_last, clamp, range);
  m.def("model_entry_grad", &model_entry_grad, py::arg("grad"), py::arg("x"), delta, out, std, spatial, named,
        py::arg("grad_last") = false, delta_last, out_last, clamp, range);
}

}  // namespace ensadv
