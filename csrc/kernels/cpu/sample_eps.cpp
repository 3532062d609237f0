#include "../sample_eps.h"

namespace ensadv {

void sample_eps_cpu(const SampleEpsArgs& args) {
  for (int64_t i = 0; i < args.n; ++i) args.out[i] = sample_eps_value(args, i);
}

}  // namespace ensadv
