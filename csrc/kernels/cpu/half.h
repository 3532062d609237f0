// Bulk conversions between float and half precision, by the processor's own instructions where it has them.
#pragma once

#include "../numeric.h"

namespace ensadv {

void convert(const half_t* src, float* dst, int n);
// To nearest, ties to even; which NaN comes out of a NaN is the processor's choice.
void convert(const float* src, half_t* dst, int n);

}  // namespace ensadv
