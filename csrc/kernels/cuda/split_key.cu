#include "../split_key.h"
#include "loop.cuh"

namespace ensadv {
namespace {

__global__ void __launch_bounds__(kThreads) split_key_kernel(SplitKeyArgs args) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.n; i += stride)
    split_key_value(args, i);
}

}  // namespace

int split_key_cuda(const SplitKeyArgs& args, void* stream) {
  return launch<1>(split_key_kernel, args.n, stream, args);
}

}  // namespace ensadv
