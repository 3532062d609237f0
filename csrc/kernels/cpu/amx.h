// ensemble_linear by the processor's tile multiplier (Intel AMX), where there is one.
#pragma once

#include "../ensemble_linear.h"

namespace ensadv {

bool has_amx();  // and the system lets this process use it
// Where has_amx(). False: there are infinite numbers among float32 or float16 ones, and the result is to be computed
// otherwise.
bool ensemble_linear_amx(const LinearArgs& args, int64_t begin, int64_t end);

}  // namespace ensadv
