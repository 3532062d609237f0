// What protects memory is checked here, before a kernel is launched, and raised as RuntimeError. What users can get
// wrong is checked earlier, in Python (ensadv_fast/ops), with more to say.
//
// Every message reads `{op}: {name} must be {wanted}, got {value}`.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../kernels/tensor_ref.h"

namespace ensadv::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- messages ------------------------------------------------------------------------------------------------------

#define ENSADV_COLD [[gnu::noinline, gnu::cold]]  // keeps the making of messages out of the ops' code

template <class... Parts>
ENSADV_COLD std::string text_of(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <class... Parts>
[[noreturn]] ENSADV_COLD void fail(const char* op, const Parts&... parts) {
  throw std::runtime_error(text_of(op, ": ", parts...));
}

// The parts of the message are evaluated only if `ok` is false.
#define ENSADV_CHECK(ok, op, ...)                                 \
  do {                                                            \
    if (!(ok)) [[unlikely]] ::ensadv::ops::fail(op, __VA_ARGS__); \
  } while (false)

ENSADV_COLD inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(dtype);
  }
}

ENSADV_COLD inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return t.is_cuda() ? text_of("cuda:", t.get_device_index()) : "another kind of device";
}

template <class Sizes>
ENSADV_COLD std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "(";
  for (const int64_t n : sizes) text << separator << n, separator = ", ";
  text << (sizes.size() == 0 ? "()" : sizes.size() == 1 ? ",)" : ")");
  return text.str();
}
ENSADV_COLD inline std::string shape_of(const Tensor& t) { return shape_text(t.sizes()); }

// A tensor as messages show it.
ENSADV_COLD inline std::string described(const Tensor& t) {
  return text_of(dtype_name(t.scalar_type()), " ", shape_of(t), " on ", device_name(t),
                 t.is_contiguous() ? "" : ", not contiguous");
}

// ---- dtypes --------------------------------------------------------------------------------------------------------

inline Dtype dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::Byte: return Dtype::u8;
    default: fail(op, name, " must be float32, float16, bfloat16, float64 or uint8, got ", dtype_name(t.scalar_type()));
  }
}

inline In in_ref(const char* op, const char* name, const Tensor& t) { return {t.data_ptr(), dtype_of(op, name, t)}; }
inline Out out_ref(const char* op, const char* name, const Tensor& t) { return {t.data_ptr(), dtype_of(op, name, t)}; }

inline ScalarType compute_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType wanted) {
  ENSADV_CHECK(t.scalar_type() == wanted, op, name, " must be ", dtype_name(wanted), ", got ",
               dtype_name(t.scalar_type()));
}

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  ENSADV_CHECK(dtype_of(op, name, t) != Dtype::u8, op, name, " must be floating point, got uint8");
}

// ---- shapes and memory ---------------------------------------------------------------------------------------------

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  bool same = t.dim() == x.dim() && t.device() == x.device();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
  ENSADV_CHECK(same, op, name, " must have x's shape ", shape_of(x), " on ", device_name(x), ", got ", described(t));
}

inline void check_apart(const char* op, const char* name_a, const Tensor& a, const char* name_b, const Tensor& b) {
  const char *i = static_cast<const char*>(a.data_ptr()), *i_end = i + a.numel() * a.element_size();
  const char *j = static_cast<const char*>(b.data_ptr()), *j_end = j + b.numel() * b.element_size();
  ENSADV_CHECK(i_end <= j || j_end <= i, op, name_a, " must not overlap ", name_b, " in memory, got ",
               std::min(i_end, j_end) - std::max(i, j), " bytes in common");
}

// Element-wise loops allow `out` to be an input, but not to overlap one at an offset.
inline void check_overlap(const char* op, const char* name, const Tensor& out, const Tensor& in) {
  if (out.data_ptr() == in.data_ptr() && out.element_size() == in.element_size()) return;
  check_apart(op, "out", out, name, in);
}

// A contiguous tensor of this shape and dtype on like's device.
inline void check_dense(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                        ScalarType dtype, const Tensor& like) {
  bool same = t.dim() == int64_t(shape.size()) && t.is_contiguous() && t.scalar_type() == dtype &&
              t.device() == like.device();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == shape.begin()[d];
  ENSADV_CHECK(same, op, name, " must be contiguous ", dtype_name(dtype), " ", shape_text(shape), " on ",
               device_name(like), ", got ", described(t));
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

enum class Format { contiguous, channels_last };

// The memory format that all of these share, so that they can be walked as flat memory. null: an absent tensor.
inline Format common_format(const char* op, std::initializer_list<const Tensor*> tensors) {
  bool contiguous = true, channels_last = true;
  for (const Tensor* t : tensors) contiguous = contiguous && (!t || t->is_contiguous());
  if (contiguous) return Format::contiguous;
  for (const Tensor* t : tensors) channels_last = channels_last && (!t || is_channels_last(*t));
  if (channels_last) return Format::channels_last;
  std::ostringstream strides;
  for (const Tensor* t : tensors)
    if (t) strides << (strides.tellp() > 0 ? ", " : "") << shape_text(t->strides());
  fail(op, "tensors must be all contiguous or all channels_last, got strides ", strides.str());
}

// ---- values --------------------------------------------------------------------------------------------------------

// `value` stands for one of an enumeration's members, from 0 to `last`.
inline void check_choice(const char* op, const char* name, int64_t value, int64_t last) {
  ENSADV_CHECK(value >= 0 && value <= last, op, name, " must be 0 to ", last, ", got ", value);
}

// The first value that is not `good`; null if all are. On CUDA no value is read, because that would wait for the
// device.
template <class T, class Good>
const T* find_bad(const Tensor& t, Good good) {
  const T* values = static_cast<const T*>(t.data_ptr());
  if (t.is_cuda()) return nullptr;
  const T* bad = std::find_if_not(values, values + t.numel(), good);
  return bad == values + t.numel() ? nullptr : bad;
}
// The same for a tensor that holds a compute type.
template <class Good>
std::optional<double> find_bad_number(const Tensor& t, Good good) {
  if (t.scalar_type() == ScalarType::Double) {
    const double* bad = find_bad<double>(t, good);
    return bad ? std::optional<double>(*bad) : std::nullopt;
  }
  const float* bad = find_bad<float>(t, good);
  return bad ? std::optional<double>(*bad) : std::nullopt;
}

// A number per sample, [N], in the compute type of x; or the number. `size`: it must not be negative.
inline PerSample per_sample(const char* op, const char* name, const std::optional<Tensor>& t, double value,
                            const Tensor& x, bool size) {
  const auto good = [size](double v) { return size ? v >= 0.0 : v == v; };
  const char* wanted = size ? " must be >= 0, got " : " must not be NaN, got ";
  if (!t) {
    ENSADV_CHECK(good(value), op, name, wanted, value);
    return {nullptr, value};
  }
  ENSADV_CHECK(x.dim() > 0, op, "x must have shape [N, ...], got ()");
  check_dense(op, name, *t, {x.size(0)}, compute_dtype(x), x);
  const std::optional<double> bad = find_bad_number(*t, good);
  ENSADV_CHECK(!bad, op, name, wanted, *bad);
  return {t->data_ptr(), value};
}

inline int64_t* int64_data(const char* op, const char* name, const Tensor& t, int64_t n, const Tensor& like) {
  check_dense(op, name, t, {n}, ScalarType::Long, like);
  return static_cast<int64_t*>(t.data_ptr());
}

inline const int64_t* index_data(const char* op, const std::optional<Tensor>& index, int64_t n, const Tensor& like) {
  if (!index) return nullptr;
  const int64_t* data = int64_data(op, "index", *index, n, like);
  const int64_t* bad = find_bad<int64_t>(*index, [](int64_t i) { return i >= 0 && i <= int64_t(UINT32_MAX); });
  ENSADV_CHECK(!bad, op, "index must lie in [0, 2^32), got ", *bad);
  return data;
}

// Contiguous float64 scratch of at least this many elements.
inline double* scratch_data(const char* op, const Tensor& t, int64_t numel, const Tensor& like) {
  ENSADV_CHECK(t.numel() >= numel && t.is_contiguous() && t.scalar_type() == ScalarType::Double &&
                   t.device() == like.device(),
               op, "scratch must be contiguous float64 of at least ", numel, " elements on ", device_name(like),
               ", got ", described(t));
  return static_cast<double*>(t.data_ptr());
}

}  // namespace ensadv::ops
