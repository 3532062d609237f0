// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11), and the map from
// (key, sample, element) to random words that every random op uses:
//   Philox key    = the two halves of the seed (low, high)
//   counter words = (block in the sample, sample index, offset low, offset high)
// A draw depends on nothing else: not on batch size, layout, dtype, device, threads or grid.
#pragma once

#include <cstdint>

#include "platform.h"

namespace ensadv {

struct Words {
  uint32_t w[4];
};

ENSADV_HD uint32_t mul_hi(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }

ENSADV_HD Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint32_t hi0 = mul_hi(0xD2511F53u, c0), lo0 = 0xD2511F53u * c0;
    const uint32_t hi1 = mul_hi(0xCD9E8D57u, c2), lo1 = 0xCD9E8D57u * c2;
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// An op's key is int64 [2] = (seed, offset). It is read on its own device, so that a CUDA key needs no sync.
struct Key {
  uint32_t seed_lo, seed_hi, offset_lo, offset_hi;
};

ENSADV_HD Key read_key(const int64_t* key) {
  const uint64_t seed = uint64_t(key[0]), offset = uint64_t(key[1]);
  return {uint32_t(seed), uint32_t(seed >> 32), uint32_t(offset), uint32_t(offset >> 32)};
}

ENSADV_HD Words draw(const Key& key, uint32_t block, uint32_t sample) {
  return philox(block, sample, key.offset_lo, key.offset_hi, key.seed_lo, key.seed_hi);
}

// Counter word 1 of sample n: index[n] (say, its position in the data set), or n where there is no index.
ENSADV_HD uint32_t sample_id(const int64_t* index, int64_t n) { return uint32_t(index ? index[n] : n); }

}  // namespace ensadv
