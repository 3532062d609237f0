// null: out = x. New ops start from this one, and benchmarks measure by it what a call costs.
#pragma once

#include "tensor_ref.h"

namespace ensadv {

struct NullArgs {
  In x;
  Out out;  // same dtype as x
  Batch batch;
};

void null_cpu(const NullArgs& args, int64_t begin, int64_t end);
int null_cuda(const NullArgs& args, void* stream);

}  // namespace ensadv
