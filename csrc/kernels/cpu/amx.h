// ensemble_linear in bfloat16 by the processor's tile multiplier (Intel AMX), where there is one.
#pragma once

#include "../ensemble_linear.h"

namespace ensadv {

bool has_amx();  // and the system lets this process use it
void ensemble_linear_amx(const LinearArgs& args, int64_t begin, int64_t end);  // bfloat16 alone, where has_amx()

}  // namespace ensadv
