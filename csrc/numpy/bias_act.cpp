#include "../kernels/bias_act.h"

#include <map>
#include <string>

#include "../kernels/act_grad.h"
#include "arrays.h"

namespace ensadv {
namespace {

uint8_t* mask_data(Array* mask, int64_t numel) {
  require(!mask || (mask->dtype == Dtype::u8 && mask->size() == mask_bytes(numel)), "the mask holds a bit per element");
  return mask ? static_cast<uint8_t*>(mask->out().data) : nullptr;
}

// `range` counts blocks.
void bias_act(const Array& x, const Array* bias, const Array* residual, Array& out, Array* mask, int64_t channels,
              int64_t channel_stride, const std::string& act, double low, double high, double slope,
              const Range& range) {
  require(channels > 0 && channel_stride > 0 && x.size() % (channels * channel_stride) == 0, "no such channels");
  const std::map<std::string, Act> acts = {
      {"relu", Act::relu}, {"hardtanh", Act::hardtanh}, {"leaky_relu", Act::leaky_relu}};
  require(acts.count(act) == 1, "no such act");
  require(out.size() == x.size() && (!residual || residual->size() == x.size()), "all arrays must have one size");
  require(x.dtype != Dtype::u8 && out.dtype == x.dtype && (!residual || residual->dtype == x.dtype),
          "all arrays must be of one float dtype");
  require(!bias || (bias->size() == channels && bias->dtype == (x.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32)),
          "one bias per channel, of the compute type, is wanted");
  const BiasActArgs args{x.in(),     residual ? residual->in() : In{},
                         bias ? bias->in().data : nullptr, out.out(), mask_data(mask, x.size()),
                         x.size(), channels, channel_stride, acts.at(act), low, high, slope};
  run(range, mask_blocks(x.size()), [&](int64_t begin, int64_t end) { bias_act_cpu(args, begin, end); });
}

void act_grad(const Array& grad, Array& mask, Array& out, std::optional<double> slope, const Range& range) {
  require(out.size() == grad.size() && out.dtype == grad.dtype && grad.dtype != Dtype::u8,
          "out must be like grad, of a float dtype");
  const ActGradArgs args{grad.in(), mask_data(&mask, grad.size()), out.out(), grad.size(),
                         slope.has_value(), slope.value_or(0.0)};
  run(range, mask_blocks(grad.size()), [&](int64_t begin, int64_t end) { act_grad_cpu(args, begin, end); });
}

}  // namespace

void bind_bias_act(py::module_& m) {
  const auto range = py::arg("range") = Range{};
  m.def("bias_act", &bias_act, py::arg("x"), py::arg("bias"), py::arg("residual"), py::arg("out"), py::arg("mask"),
        py::kw_only(), py::arg("channels"), py::arg("channel_stride") = 1, py::arg("act") = "relu",
        py::arg("low") = 0.0, py::arg("high") = 0.0, py::arg("slope") = 1.0, range);
  m.def("act_grad", &act_grad, py::arg("grad"), py::arg("mask"), py::arg("out"), py::kw_only(),
        py::arg("slope") = py::none(), range);
}

}  // namespace ensadv
