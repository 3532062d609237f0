// The normal quantile function in float32. It has no branches and uses only operations whose result IEEE 754 fixes
// (square root and division among them), so that every compiler, instruction set and device computes the same bits.
#pragma once

#include <cmath>

#include "numeric.h"

namespace ensadv {

// log x for normal x > 0, error below 1.2e-7 relative (Cephes' polynomial on [sqrt 1/2, sqrt 2)).
ENSADV_HD float log_positive(float x) {
  const uint32_t u = float_bits(x) - 0x3f3504f3u;  // exponent of x / sqrt(1/2)
  const float e = float(int32_t(u) >> 23);
  const float m = bits_float((u & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float square = m * m;
  const float tail = m * square * p - 2.12194440e-4f * e - 0.5f * square;
  return m + tail + 0.693359375f * e;
}

// z with Phi(z) = 1/2 + q, for 2^-26 <= |q| <= 1/2 - 2^-25: Wichura's AS 241, PPND7 (Applied Statistics 37, 1988).
ENSADV_HD float quantile(float q) {
  const float a = q < 0.0f ? -q : q;
  const float r = 0.180625f - q * q;
  const float central =
      q * (((59.109374720f * r + 159.29113202f) * r + 50.434271938f) * r + 3.3871327179f) /
      (((67.187563600f * r + 78.757757664f) * r + 17.895169469f) * r + 1.0f);
  const float t = sqrtf(-log_positive(0.5f - a)) - 1.6f;
  const float tail = (((0.17023821103f * t + 1.3067284816f) * t + 2.7568153900f) * t + 1.4234372777f) /
                     ((0.12021132975f * t + 0.73700164250f) * t + 1.0f);
  return a <= 0.425f ? central : (q < 0.0f ? -tail : tail);
}

}  // namespace ensadv
