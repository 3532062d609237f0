#include "../split_key.h"

namespace ensadv {

void split_key_cpu(const SplitKeyArgs& args) {
  for (int64_t i = 0; i < args.n; ++i) split_key_value(args, i);
}

}  // namespace ensadv
