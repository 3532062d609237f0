// split_key: n keys from one, each (seed, offset) read from one Philox block. The seed is marked first, so that
// a child never coincides with noise drawn under its parent.
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
  // Offsets stay below 2^62: a caller may count upwards from one without overflow.
  a.out[2 * i + 1] = int64_t((uint64_t(block.w[3]) << 32 | block.w[2]) >> 2);
}

void split_key_cpu(const SplitKeyArgs& args);
int split_key_cuda(const SplitKeyArgs& args, void* stream);

}  // namespace ensadv
