// Every CUDA launcher against its CPU launcher: one line per case, then "N passed, N failed". Exit status 0, 1 on a
// failure, 77 where there is no usable GPU.
#include "harness.h"

int main() {
  using namespace ensadv::selftest;
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    printf("no usable GPU: %s\n", error == cudaSuccess ? "none found" : ensadv::cuda_error_text(int(error)));
    return 77;
  }
  cudaDeviceProp device;
  must(int(cudaGetDeviceProperties(&device, 0)), "cudaGetDeviceProperties");
  printf("%s, sm_%d%d\n", device.name, device.major, device.minor);
  Harness harness;
  check_numbers(harness);
  check_steps(harness);
  check_random_steps(harness);
  check_keys(harness);
  check_model_entries(harness);
  check_activations(harness);
  check_logit_grads(harness);
  check_ensemble_linears(harness);
  check_far_offsets(harness);
  printf("%d passed, %d failed\n", harness.passed(), harness.failed());
  return harness.failed() ? 1 : 0;
}
