// act_grad: grad where the mask has a bit; elsewhere 0, also where grad is NaN or infinite, or slope * grad if there is
// a slope: the backward pass of bias_act. Without a slope bits are copied, so that only the dtype's width matters.
#pragma once

#include "mask.h"
#include "tensor_ref.h"

namespace ensadv {

struct ActGradArgs {
  In grad;
  const uint8_t* mask = nullptr;
  Out out;  // grad's dtype
  int64_t numel = 0;
  bool sloping = false;
  double slope = 0.0;  // where sloping; rounded to the compute type
};

// Over blocks [begin, end) of kMaskBlock elements.
void act_grad_cpu(const ActGradArgs& args, int64_t begin, int64_t end);
int act_grad_cuda(const ActGradArgs& args, void* stream);

}  // namespace ensadv
