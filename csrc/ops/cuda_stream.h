// torch declares this function only under USE_CUDA, which would include CUDA headers, and a CPU-only torch does not
// define it. This weak declaration is null there.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
