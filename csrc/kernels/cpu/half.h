// Bulk conversions between float and half precision, by the processor's own instructions if it has them.
#pragma once

#include "../numeric.h"

namespace ensadv {

void convert(const half_t* src, float* dst, int n);
// Rounds to nearest, ties to even; v becomes the value of dst. The result for NaN is some NaN, which one is up to the
// processor.
void round_in_place(float* v, half_t* dst, int n);

}  // namespace ensadv
