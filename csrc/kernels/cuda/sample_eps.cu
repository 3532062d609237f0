#include "../sample_eps.h"
#include "loop.cuh"

namespace ensadv {
namespace {

__global__ void __launch_bounds__(kThreads) sample_eps_kernel(SampleEpsArgs args) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.n; i += stride)
    args.out[i] = sample_eps_value(args, i);
}

}  // namespace

int sample_eps_cuda(const SampleEpsArgs& args, void* stream) {
  return launch<1>(sample_eps_kernel, args.n, stream, args);
}

}  // namespace ensadv
