// bias_act: act(x + bias[channel] + residual), summed in that order in the compute type and rounded once. The mask has
// a 1 where the derivative of act is 1.
#pragma once

#include "mask.h"
#include "numeric.h"
#include "tensor_ref.h"

namespace ensadv {

// relu: max(v, 0). hardtanh: v clamped to [low, high]; both ends are first rounded to x's dtype (ReLU6 is [0, 6]).
// leaky_relu: v where v > 0, else slope * v.
enum class Act : int64_t { relu, hardtanh, leaky_relu };

struct BiasActArgs {
  In x, residual;              // residual: may be absent; x's dtype
  const void* bias = nullptr;  // [channels], compute type; may be absent
  Out out;                     // x's dtype
  uint8_t* mask = nullptr;     // absent: the result is the sum, without act
  int64_t numel = 0, channels = 1;
  int64_t channel_stride = 1;  // elements from a channel to the next: 1 in channels_last, else the pixels of a plane
  Act act = Act::relu;
  double low = 0.0, high = 0.0;  // of hardtanh; low <= high
  double slope = 1.0;            // of leaky_relu; >= 0
};

// Every activation as one formula: a slope for negative sums, then a clamp. As in torch, a NaN stays NaN and -0 stays
// -0 wherever the clamp lets it through.
template <class A>
struct BiasAct {
  A slope = A(1), lo = -A(INFINITY), hi = A(INFINITY);
  A pass_above = A(0), pass_below = A(NAN);  // the derivative is 1 between these results; NaN: no upper end

  template <class T>
  static BiasAct of(const BiasActArgs& args, T) {
    BiasAct f;
    if (!args.mask) return f;
    if (args.act == Act::relu) f.lo = A(0);
    if (args.act == Act::leaky_relu) f.slope = A(args.slope);
    if (args.act == Act::hardtanh) {
      f.lo = f.pass_above = to_compute(round_to<T>(A(args.low)));
      f.hi = f.pass_below = to_compute(round_to<T>(A(args.high)));
    }
    return f;
  }

  ENSADV_HD A operator()(A sum) const {
    const A v = sum > A(0) ? sum : sum * slope;
    return v < lo ? lo : v > hi ? hi : v;
  }

  ENSADV_HD bool passes(A y) const { return y > pass_above && !(y >= pass_below); }  // not for NaN
};

// Stands for an absent bias. Adding -0 changes no number, not even -0.
template <class A>
constexpr A kNoBias = A(-0.0);

// Is this result greater than 0? NaN is not. The patterns of positive 16-bit numbers are 1 to infinity's.
ENSADV_HD bool is_positive(float y) { return y > 0.0f; }
ENSADV_HD bool is_positive(double y) { return y > 0.0; }
ENSADV_HD bool is_positive(half_t y) { return uint16_t(y.bits - 1) < 0x7c00u; }
ENSADV_HD bool is_positive(bfloat_t y) { return uint16_t(y.bits - 1) < 0x7f80u; }

// Over blocks [begin, end) of kMaskBlock elements.
void bias_act_cpu(const BiasActArgs& args, int64_t begin, int64_t end);
int bias_act_cuda(const BiasActArgs& args, void* stream);

}  // namespace ensadv
