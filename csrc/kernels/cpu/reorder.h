// Brings planes, which begin `stride` elements apart, into the order of pixels (channels_last), and back.
#pragma once

#include <cstdint>
#include <type_traits>

namespace ensadv {

void interleave(const uint16_t* planes, int64_t stride, int64_t channels, int n, uint16_t* pixels);
void interleave(const float* planes, int64_t stride, int64_t channels, int n, float* pixels);
void interleave(const double* planes, int64_t stride, int64_t channels, int n, double* pixels);
void split(const uint16_t* pixels, int64_t channels, int n, uint16_t* planes, int64_t stride);
void split(const float* pixels, int64_t channels, int n, float* planes, int64_t stride);
void split(const double* pixels, int64_t channels, int n, double* planes, int64_t stride);

// 16-bit numbers as uint16_t: reordering depends on the width alone.
template <class T>
auto* raw(T* p) {
  using U = std::conditional_t<sizeof(T) == 2, uint16_t, std::remove_const_t<T>>;
  return reinterpret_cast<std::conditional_t<std::is_const_v<T>, const U, U>*>(p);
}

}  // namespace ensadv
