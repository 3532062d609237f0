// momentum_step: momentum = decay * momentum + grad / mean|grad| per sample, then a sign step along the momentum
// (MI-FGSM, Dong et al. 2018, with the mean in place of the sum: the factor between them does not change a sign).
#pragma once

#include "reduce.h"
#include "sign_step.h"

namespace ensadv {

struct MomentumStepArgs {
  SignStepArgs step;     // grad is the gradient, although the step follows the momentum
  void* momentum;        // the compute type of step.out
  double* scratch;       // [N, chunks]: sums of |grad|
  double decay;
};

template <class A>
ENSADV_HD A absolute(A g) {  // NaN counts as 0
  return g < A(0) ? -g : g > A(0) ? g : A(0);
}

template <class A>
ENSADV_HD A next_momentum(A momentum, A grad, A mean, A decay) {
  const A pull = is_usable(mean) ? (grad != grad ? A(0) : grad / mean) : A(0);
  return decay * momentum + pull;
}

// To be called in this order. The range counts the batch's chunks (reduce.h) in the first, elements in the second.
void momentum_sums_cpu(const MomentumStepArgs& args, int64_t begin, int64_t end);
void momentum_step_cpu(const MomentumStepArgs& args, int64_t begin, int64_t end);
int momentum_step_cuda(const MomentumStepArgs& args, void* stream);

}  // namespace ensadv
