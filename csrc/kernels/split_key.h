// split_key: n child keys from one key. Each child's (seed, offset) is one Philox block, drawn under the parent's seed
// with a mark, so that a child never coincides with noise drawn under its parent.
#pragma once

#include "philox.h"

namespace ensadv {

struct SplitKeyArgs {
  const int64_t* key = nullptr;
  int64_t* out = nullptr;  // [n, 2]
  int64_t n = 0;
};

constexpr uint32_t kSplitMark = 0x53504C54u;  // "SPLT"

ENSADV_HD void split_key_value(const SplitKeyArgs& a, int64_t i) {
  Key key = read_key(a.key);
  key.seed_hi ^= kSplitMark;
  const Words block = draw(key, uint32_t(i), uint32_t(uint64_t(i) >> 32));
  a.out[2 * i] = int64_t(uint64_t(block.w[1]) << 32 | block.w[0]);
  // An offset is below 2^62, so that callers may count up from it without overflow.
  a.out[2 * i + 1] = int64_t((uint64_t(block.w[3]) << 32 | block.w[2]) >> 2);
}

void split_key_cpu(const SplitKeyArgs& args);
int split_key_cuda(const SplitKeyArgs& args, void* stream);

}  // namespace ensadv
