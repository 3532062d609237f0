// act_grad: the backward pass of bias_act. The result is grad where the mask has a 1. Where it has a 0, the result is 0
// even if grad is NaN or infinite, or slope * grad if there is a slope. Without a slope the bits of grad are copied, so
// that only the dtype's width matters.
#pragma once

#include "mask.h"
#include "tensor_ref.h"

namespace ensadv {

struct ActGradArgs {
  In grad;
  const uint8_t* mask = nullptr;
  Out out;  // grad's dtype
  int64_t numel = 0;
  bool sloping = false;  // is there a slope?
  double slope = 0.0;    // rounded to the compute type
};

// Over blocks [begin, end) of kMaskBlock elements.
void act_grad_cpu(const ActGradArgs& args, int64_t begin, int64_t end);
int act_grad_cuda(const ActGradArgs& args, void* stream);

}  // namespace ensadv
