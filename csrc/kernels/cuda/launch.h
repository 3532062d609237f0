// What an op needs from the CUDA side besides its launcher. Error codes are cudaError_t as int.
#pragma once

namespace ensadv {

const char* cuda_error_text(int code);

}  // namespace ensadv
