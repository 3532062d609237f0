#include "launch.h"

#include <cuda_runtime.h>

namespace ensadv {

const char* cuda_error_text(int code) {
  if (code == cudaErrorInsufficientDriver)
    return "the GPU driver is older than the CUDA toolkit this extension was built with: update the driver, or "
           "rebuild with an older toolkit (docs/building.md)";
  if (code == cudaErrorNoKernelImageForDevice)
    return "this extension holds no code for this GPU: rebuild with TORCH_CUDA_ARCH_LIST set to its architecture";
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace ensadv
