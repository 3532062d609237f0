// ensemble_linear by the tile multiplier of some processors (Intel AMX).
#pragma once

#include "../ensemble_linear.h"

namespace ensadv {

bool has_amx();  // does the processor have it, and does the system let this process use it?
// Needs has_amx(). False: the operands hold infinite float32 or float16 numbers; the caller must compute the result
// anew.
bool ensemble_linear_amx(const LinearArgs& args, int64_t begin, int64_t end);

}  // namespace ensadv
