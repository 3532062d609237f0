#include "reorder.h"

#include "../platform.h"

namespace ensadv {
namespace {

// Indices are 64-bit. Python extensions are built with -fwrapv, under which the int 3 * p + c might wrap, and the loop
// would not vectorise.
#define ENSADV_REORDER_FIXED(U, C)                                                      \
  ENSADV_CLONES void interleave##C(const U* planes, int64_t stride, int n, U* pixels) { \
    ENSADV_INDEPENDENT for (int64_t p = 0; p < n; ++p)                                  \
      for (int c = 0; c < C; ++c) pixels[C * p + c] = planes[c * stride + p];           \
  }                                                                                     \
  ENSADV_CLONES void split##C(const U* pixels, int n, U* planes, int64_t stride) {      \
    ENSADV_INDEPENDENT for (int64_t p = 0; p < n; ++p)                                  \
      for (int c = 0; c < C; ++c) planes[c * stride + p] = pixels[C * p + c];           \
  }
#define ENSADV_REORDER_FEW(U) \
  ENSADV_REORDER_FIXED(U, 2)  \
  ENSADV_REORDER_FIXED(U, 3)  \
  ENSADV_REORDER_FIXED(U, 4)
ENSADV_REORDER_FEW(uint16_t)
ENSADV_REORDER_FEW(float)
ENSADV_REORDER_FEW(double)
#undef ENSADV_REORDER_FEW
#undef ENSADV_REORDER_FIXED

}  // namespace

#define ENSADV_REORDER(U)                                                                \
  void interleave(const U* planes, int64_t stride, int64_t channels, int n, U* pixels) { \
    switch (channels) {                                                                  \
      case 2: return interleave2(planes, stride, n, pixels);                             \
      case 3: return interleave3(planes, stride, n, pixels);                             \
      case 4: return interleave4(planes, stride, n, pixels);                             \
    }                                                                                    \
    for (int64_t c = 0; c < channels; ++c)                                               \
      for (int64_t p = 0; p < n; ++p) pixels[p * channels + c] = planes[c * stride + p]; \
  }                                                                                      \
  void split(const U* pixels, int64_t channels, int n, U* planes, int64_t stride) {      \
    switch (channels) {                                                                  \
      case 2: return split2(pixels, n, planes, stride);                                  \
      case 3: return split3(pixels, n, planes, stride);                                  \
      case 4: return split4(pixels, n, planes, stride);                                  \
    }                                                                                    \
    for (int64_t c = 0; c < channels; ++c)                                               \
      for (int64_t p = 0; p < n; ++p) planes[c * stride + p] = pixels[p * channels + c]; \
  }
ENSADV_REORDER(uint16_t)
ENSADV_REORDER(float)
ENSADV_REORDER(double)
#undef ENSADV_REORDER

}  // namespace ensadv
