// What an op needs from the CUDA side besides its launcher. An error code is a cudaError_t as int.
#pragma once

namespace ensadv {

const char* cuda_error_text(int code);

}  // namespace ensadv
