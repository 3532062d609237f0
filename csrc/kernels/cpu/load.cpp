#include "half.h"
#include "loop.h"

namespace ensadv {
namespace {

using ensadv::convert;  // from half to float

#define ENSADV_CONVERT(T, A)                                                       \
  ENSADV_CLONES void convert(const T* src, A* dst, int n) {                        \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) dst[i] = A(to_compute(src[i])); \
  }
ENSADV_CONVERT(bfloat_t, float)
ENSADV_CONVERT(level_t, float)
ENSADV_CONVERT(double, float)
ENSADV_CONVERT(half_t, double)
ENSADV_CONVERT(bfloat_t, double)
ENSADV_CONVERT(level_t, double)
ENSADV_CONVERT(float, double)
#undef ENSADV_CONVERT

template <class T>
void fetch_ahead(const T* next, int n) {
  const char* p = reinterpret_cast<const char*>(next);
  for (size_t line = 0; line < size_t(n) * sizeof(T); line += 64) __builtin_prefetch(p + line, 0, 2);
}

template <class A>
const A* load_as(const In& in, int64_t i, int n, A* scratch) {
  const A* result = scratch;
  with_dtype(in.dtype, [&](auto t) {
    using T = decltype(t);
    const T* src = static_cast<const T*>(in.data) + i;
    if constexpr (std::is_same_v<T, A>) {
      result = src;
    } else {
      convert(src, scratch, n);
      fetch_ahead(src + n, n);  // arrives while this strip is computed
    }
  });
  return result;
}

}  // namespace

const float* load(const In& in, int64_t i, int n, float* scratch) { return load_as(in, i, n, scratch); }
const double* load(const In& in, int64_t i, int n, double* scratch) { return load_as(in, i, n, scratch); }

}  // namespace ensadv
