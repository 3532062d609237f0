#include "../kernels/act_grad.h"
#include "../kernels/bias_act.h"
#include "harness.h"

namespace ensadv::selftest {
namespace {

struct ActCase {
  Dtype dtype;
  int64_t channels;
  bool channels_last, residual, misaligned, in_place;
  Act act;

  std::string name() const {
    return std::string("bias_act ") + name_of(dtype) + ", " + std::to_string(channels) +
           (channels_last ? " channels last" : " channels") + (residual ? ", residual, " : ", ") +
           (misaligned ? "misaligned" : in_place ? "in place" : "apart") +
           (act == Act::relu ? "" : act == Act::hardtanh ? ", clipped" : ", leaky");
  }
};

// bias_act, and act_grad in place by its mask.
void check_bias_act(Harness& harness, const ActCase& c) {
  harness.over_shapes(c.name(), [&](const Shape& s) {
    const Dtype dtype = c.dtype, compute = dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
    const int64_t spatial = std::max<int64_t>(1, s.inner / c.channels), n = s.samples * c.channels * spatial;
    const TwinPtr x = random_values(dtype, n, -1, 1, c.misaligned, 1);
    const TwinPtr residual = c.residual ? random_values(dtype, n, -1, 1, c.misaligned, 2) : nullptr;
    const TwinPtr bias = random_values(compute, c.channels, -1, 1, c.misaligned, 3);
    const TwinPtr grad = random_values(dtype, n, -1, 1, c.misaligned, 4);
    const TwinPtr fresh = Variant{.misaligned_out = c.misaligned, .in_place = c.in_place}.fresh_out(n, dtype);
    Twin &out = fresh ? *fresh : *x, mask(mask_bytes(n), 0);
    const auto forward = [&](Side side) {
      return BiasActArgs{in_of(x, dtype, side), in_of(residual, dtype, side), data_of(bias, side),
                         out_of(out, dtype, side), data_as<uint8_t>(mask, side), n, c.channels,
                         c.channels_last ? 1 : spatial, c.act, -0.1, 0.7, 0.01};
    };
    const auto backward = [&](Side side) {
      return ActGradArgs{in_of(grad, dtype, side), data_as<uint8_t>(mask, side), out_of(*grad, dtype, side), n,
                         c.act == Act::leaky_relu, 0.01};
    };
    bias_act_cpu(forward(Side::host), 0, mask_blocks(n));
    act_grad_cpu(backward(Side::host), 0, mask_blocks(n));
    harness.must_finish(bias_act_cuda(forward(Side::device), harness.stream()), "bias_act");
    harness.must_finish(act_grad_cuda(backward(Side::device), harness.stream()), "act_grad");
    const std::string of_mask = mask.difference(Dtype::u8), of_grad = grad->difference(dtype);
    if (!of_mask.empty()) return "mask: " + of_mask;
    return of_grad.empty() ? out.difference(dtype) : "act_grad: " + of_grad;
  });
}

}  // namespace

void check_activations(Harness& harness) {
  for (Dtype dtype : kFloats)
    for (int64_t channels : {1, 3, 5, 8, 64})
      for (bool channels_last : {false, true})
        for (bool residual : {false, true})
          for (int how = 0; how < 3; ++how)
            for (Act act : {Act::relu, Act::hardtanh, Act::leaky_relu})
              check_bias_act(harness, {dtype, channels, channels_last, residual, how == 1, how == 2, act});
}

}  // namespace ensadv::selftest
