// From torch's stable ABI to layer 1: on which device, stream and threads a launcher runs, and how an op is registered.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../kernels/cuda/launch.h"
#include "../kernels/reduce.h"
#include "check.h"
#include "cuda_stream.h"

namespace ensadv::ops {

// The fewest elements that a CPU thread takes. Fewer elements are done by the calling thread.
constexpr int64_t kGrain = 32768;

inline Batch batch_of(const Tensor& x) {
  const int64_t numel = x.numel();
  const int64_t n = x.dim() ? x.size(0) : 1;
  return {numel, n > 0 && numel > 0 ? numel / n : 1};
}

// The fewest chunks of a reduction that a CPU thread takes.
inline int64_t chunk_grain(const Batch& batch) {
  const int64_t elements = batch.inner / chunks_of(batch.inner).count;
  return elements >= kGrain ? 1 : kGrain / (elements > 0 ? elements : 1);
}

// Runs launch(stream) on the tensor's device and its current stream.
template <class Launch>
void on_cuda(const char* op, const Tensor& t, Launch launch) {
#if defined(ENSADV_WITH_CUDA)
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  ENSADV_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, "tensors must be on cpu, got ", device_name(t),
               ": this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  const int error = launch(stream);
  ENSADV_CHECK(error == 0, op, cuda_error_text(error));
#else
  (void)launch;
  fail(op, "tensors must be on cpu, got ", device_name(t),
       ": ensadv_fast was built without CUDA, rebuild it where nvcc is on the PATH (docs/building.md)");
#endif
}

template <class Body>
void on_cpu(int64_t numel, const Body& body, int64_t grain = kGrain) {
  if (numel <= grain)
    body(int64_t(0), numel);
  else
    torch::stable::parallel_for(0, numel, grain, body);
}

}  // namespace ensadv::ops

// Registers an op: its schema, and one function that serves both devices.
#define ENSADV_OP(name, schema)                                                       \
  STABLE_TORCH_LIBRARY_FRAGMENT(ensadv_fast, m) { m.def(#name schema); }              \
  STABLE_TORCH_LIBRARY_IMPL(ensadv_fast, CPU, m) { m.impl(#name, TORCH_BOX(&name)); } \
  STABLE_TORCH_LIBRARY_IMPL(ensadv_fast, CUDA, m) { m.impl(#name, TORCH_BOX(&name)); }
