// Bulk conversions between float and half precision, by the processor's own instructions where it has them.
#pragma once

#include "../numeric.h"

namespace ensadv {

void convert(const half_t* src, float* dst, int n);
// To nearest, ties to even; v becomes what the result is worth. Which NaN a NaN gives is the processor's choice.
void round_in_place(float* v, half_t* dst, int n);

}  // namespace ensadv
