// From torch's stable ABI to layer 1: what protects memory is checked here and raised as RuntimeError; whatever
// a user can get wrong is checked first in Python (ensadv_fast/ops), with a friendlier message.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "../kernels/cuda/launch.h"
#include "../kernels/reduce.h"
#include "../kernels/tensor_ref.h"
#include "cuda_stream.h"

namespace ensadv::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements a CPU thread takes at least; less than this is done in one go.
constexpr int64_t kGrain = 32768;

enum class Format { contiguous, channels_last };

inline Dtype dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::Byte: return Dtype::u8;
    default: STD_TORCH_CHECK(false, op, ": dtype must be float32, float16, bfloat16, float64 or uint8");
  }
}

inline bool is_channels_last(const Tensor& t) {
  const int64_t dim = t.dim();
  if (dim != 4 && dim != 5) return false;
  int64_t expected = 1;
  for (int64_t k = 0; k < dim; ++k) {
    const int64_t d = k == 0 ? 1 : k == dim - 1 ? 0 : dim - k;  // channels, spatial from the last, batch
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// The one memory format that all of these share, so that they can be walked as flat memory; null: not there.
inline Format common_format(const char* op, std::initializer_list<const Tensor*> tensors) {
  bool contiguous = true, channels_last = true;
  for (const Tensor* t : tensors) contiguous = contiguous && (!t || t->is_contiguous());
  if (contiguous) return Format::contiguous;
  for (const Tensor* t : tensors) channels_last = channels_last && (!t || is_channels_last(*t));
  STD_TORCH_CHECK(channels_last, op, ": tensors must all be contiguous, or all channels_last");
  return Format::channels_last;
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  bool same = t.dim() == x.dim() && t.device() == x.device();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, op, ": ", name, " must have x's shape and device");
}

inline void check_apart(const char* op, const char* name_a, const Tensor& a, const char* name_b, const Tensor& b) {
  const char* i = static_cast<const char*>(a.data_ptr());
  const char* j = static_cast<const char*>(b.data_ptr());
  const bool apart = i + a.numel() * a.element_size() <= j || j + b.numel() * b.element_size() <= i;
  STD_TORCH_CHECK(apart, op, ": ", name_a, " overlaps ", name_b, " in memory");
}

// Elementwise loops allow `out` to be an input, never to overlap one at an offset.
inline void check_overlap(const char* op, const char* name, const Tensor& out, const Tensor& in) {
  if (out.data_ptr() == in.data_ptr() && out.element_size() == in.element_size()) return;
  check_apart(op, "out", out, name, in);
}

inline Batch batch_of(const Tensor& x) {
  const int64_t numel = x.numel();
  const int64_t n = x.dim() ? x.size(0) : 1;
  return {numel, n > 0 && numel > 0 ? numel / n : 1};
}

inline In in_ref(const char* op, const Tensor& t) { return {t.data_ptr(), dtype_of(op, t)}; }
inline Out out_ref(const char* op, const Tensor& t) { return {t.data_ptr(), dtype_of(op, t)}; }

// Does every number that can be looked at without waiting for a device satisfy `good`?
template <class T, class Good>
bool all_readable(const Tensor& t, Good good) {
  const T* values = static_cast<const T*>(t.data_ptr());
  return t.is_cuda() || std::all_of(values, values + t.numel(), good);
}

// A number per sample, [N], in the compute type of x; or the number. `size`: it must not be negative.
inline PerSample per_sample(const char* op, const char* name, const std::optional<Tensor>& t, double value,
                            const Tensor& x, bool size) {
  const auto good = [size](double v) { return size ? v >= 0.0 : v == v; };
  const char* wanted_values = size ? " must be >= 0" : " must not be NaN";
  STD_TORCH_CHECK(t || good(value), op, ": ", name, wanted_values);
  if (!t) return {nullptr, value};
  const bool is_double = x.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(t->dim() == 1 && x.dim() > 0 && t->size(0) == x.size(0) && t->is_contiguous() &&
                      t->scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float) && t->device() == x.device(),
                  op, ": ", name, " must be a contiguous [N] tensor on x's device, float32 (float64 for float64 x)");
  STD_TORCH_CHECK(is_double ? all_readable<double>(*t, good) : all_readable<float>(*t, good), op, ": ", name, wanted_values);
  return {t->data_ptr(), value};
}

inline const int64_t* int64_data(const char* op, const char* name, const Tensor& t, int64_t n, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n && t.is_contiguous() && t.scalar_type() == ScalarType::Long &&
                      t.device() == like.device(),
                  op, ": ", name, " must be a contiguous int64 [", n, "] tensor on the output's device");
  return static_cast<const int64_t*>(t.data_ptr());
}

inline const int64_t* index_data(const char* op, const std::optional<Tensor>& index, int64_t n, const Tensor& like) {
  if (!index) return nullptr;
  const int64_t* data = int64_data(op, "index", *index, n, like);
  const auto good = [](int64_t i) { return i >= 0 && i <= int64_t(UINT32_MAX); };
  STD_TORCH_CHECK(all_readable<int64_t>(*index, good), op, ": index must lie in [0, 2^32)");
  return data;
}

// Chunks of a reduction that a CPU thread takes at least.
inline int64_t chunk_grain(const Batch& batch) {
  const int64_t elements = batch.inner / chunks_of(batch.inner).count;
  return elements >= kGrain ? 1 : kGrain / (elements > 0 ? elements : 1);
}

// Run launch(stream) on the tensor's device and its current stream.
template <class Launch>
void on_cuda(const char* op, const Tensor& t, Launch launch) {
#if defined(ENSADV_WITH_CUDA)
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, ": this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  const int error = launch(stream);
  STD_TORCH_CHECK(error == 0, op, ": ", cuda_error_text(error));
#else
  (void)t;
  (void)launch;
  STD_TORCH_CHECK(false, op, ": ensadv_fast was built without CUDA: rebuild where nvcc stands (docs/building.md)");
#endif
}

// Contiguous float64 scratch of at least this many elements.
inline double* scratch_data(const char* op, const Tensor& t, int64_t numel, const Tensor& like) {
  STD_TORCH_CHECK(t.numel() >= numel && t.is_contiguous() && t.scalar_type() == ScalarType::Double &&
                      t.device() == like.device(),
                  op, ": scratch must be contiguous float64, at least ", numel, " elements on x's device");
  return static_cast<double*>(t.data_ptr());
}

template <class Body>
void on_cpu(int64_t numel, const Body& body, int64_t grain = kGrain) {
  if (numel <= grain)
    body(int64_t(0), numel);
  else
    torch::stable::parallel_for(0, numel, grain, body);
}

}  // namespace ensadv::ops

// One op: its schema, and one function that serves both devices.
#define ENSADV_OP(name, schema)                                                       \
  STABLE_TORCH_LIBRARY_FRAGMENT(ensadv_fast, m) { m.def(#name schema); }              \
  STABLE_TORCH_LIBRARY_IMPL(ensadv_fast, CPU, m) { m.impl(#name, TORCH_BOX(&name)); } \
  STABLE_TORCH_LIBRARY_IMPL(ensadv_fast, CUDA, m) { m.impl(#name, TORCH_BOX(&name)); }
