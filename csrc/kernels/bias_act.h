// bias_act: relu(x + bias[channel] + residual), summed in that order in the compute type and rounded once, with a mask
// of where the result is positive.
#pragma once

#include "mask.h"
#include "numeric.h"
#include "tensor_ref.h"

namespace ensadv {

struct BiasActArgs {
  In x, residual;              // residual: may be absent; x's dtype
  const void* bias = nullptr;  // [channels], compute type; may be absent
  Out out;                     // x's dtype
  uint8_t* mask = nullptr;     // absent: the sum is the result, without ReLU
  int64_t numel = 0, channels = 1;
  int64_t run = 1;  // neighbours in memory that share a channel: 1 in channels_last, else the pixels of a plane
};

// As torch.relu: NaN passes, and -0 stays.
template <class A>
struct BiasAct {
  A least;

  explicit BiasAct(bool relu) : least(relu ? A(0) : -A(INFINITY)) {}

  ENSADV_HD A operator()(A sum) const { return sum < least ? least : sum; }
};

// What an absent bias adds: it leaves -0 as it is, too.
template <class A>
constexpr A kNoBias = A(-0.0);

// Is this result greater than 0? A NaN is not.
ENSADV_HD bool positive(float y) { return y > 0.0f; }
ENSADV_HD bool positive(double y) { return y > 0.0; }
ENSADV_HD bool positive(half_t y) { return uint16_t(y.bits - 1) < 0x7c00u; }
ENSADV_HD bool positive(bfloat_t y) { return uint16_t(y.bits - 1) < 0x7f80u; }

// Over blocks [begin, end) of kMaskBlock elements.
void bias_act_cpu(const BiasActArgs& args, int64_t begin, int64_t end);
int bias_act_cuda(const BiasActArgs& args, void* stream);

}  // namespace ensadv
