#include "half.h"
#include "loop.h"

namespace ensadv {
namespace {

ENSADV_HD bfloat_t finish_stored(float v, float c, float eps, const Box<bfloat_t>& box) {
  return finish_clamped(v, c, eps, box);
}
ENSADV_HD level_t finish_stored(float v, float c, float eps, const Box<level_t>& box) { return finish(v, c, eps, box); }

ENSADV_HD float of_element(float eps, int) { return eps; }
ENSADV_HD float of_element(const float* eps, int i) { return eps[i]; }

// E: one eps for all elements, or one for each.
#define ENSADV_STORE(T, E)                                                                                      \
  ENSADV_CLONES void store_all(const float* v, const float* c, E eps, Box<T> box, T* out, int n) {              \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) out[i] = finish_stored(v[i], c[i], of_element(eps, i), box); \
  }
ENSADV_STORE(bfloat_t, float)
ENSADV_STORE(bfloat_t, const float*)
ENSADV_STORE(level_t, float)
ENSADV_STORE(level_t, const float*)
#undef ENSADV_STORE

// step_all: `bits` are the numbers after rounding, and r their values.
#define ENSADV_STORE_HALF(E)                                                                                  \
  ENSADV_CLONES void step_all(const half_t* bits, const float* r, const float* c, E eps, Box<half_t> box,     \
                              half_t* out, int n) {                                                           \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i)                                                            \
      out[i].bits = uint16_t(r[i] != r[i] ? quiet_nan(half_t{})                                               \
                                          : bits[i].bits + step_inward(r[i], c[i], of_element(eps, i), box)); \
  }                                                                                                           \
  void store_all(float* v, const float* c, E eps, const Box<half_t>& box, half_t* out, int n) {               \
    half_t bits[kStrip];                                                                                      \
    round_in_place(v, bits, n);                                                                               \
    step_all(bits, v, c, eps, box, out, n);                                                                   \
  }
ENSADV_STORE_HALF(float)
ENSADV_STORE_HALF(const float*)
#undef ENSADV_STORE_HALF

}  // namespace

#define ENSADV_STORE(T)                                                                      \
  void store(float* v, const float* c, float eps, const Box<T>& box, T* out, int n) {        \
    store_all(v, c, eps, box, out, n);                                                       \
  }                                                                                          \
  void store(float* v, const float* c, const float* eps, const Box<T>& box, T* out, int n) { \
    store_all(v, c, eps, box, out, n);                                                       \
  }
ENSADV_STORE(half_t)
ENSADV_STORE(bfloat_t)
ENSADV_STORE(level_t)
#undef ENSADV_STORE

}  // namespace ensadv
