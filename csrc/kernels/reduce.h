// Sums over each sample, in an order that the shape alone fixes: the same bits on the CPU, on a GPU, and for any
// number of threads.
//
// A sample is cut into chunks. Within one, element e goes to slot e % kSlots; a slot sums its elements in turn, in
// double. The slots are then folded: first the kSlotPack neighbours of a lane, then lanes of a warp, then warps, each
// by halving. The chunks' sums lie in a scratch tensor [N, chunks], and are added up in order where they are used.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace ensadv {

constexpr int kReduceThreads = 256;
constexpr int kSlotPack = 8;
constexpr int kSlots = kReduceThreads * kSlotPack;
constexpr int64_t kMinChunk = 16384;
constexpr int64_t kMaxChunks = 64;

struct Chunks {
  int64_t size = kMinChunk;
  int64_t count = 1;
};

// How a sample of `inner` elements is cut. The Python side allocates scratch by the same rule.
inline Chunks chunks_of(int64_t inner) {
  Chunks c;
  const int64_t size = (inner + kMaxChunks - 1) / kMaxChunks;
  if (size > c.size) c.size = (size + kSlots - 1) / kSlots * kSlots;
  c.count = (inner + c.size - 1) / c.size;
  return c;
}

ENSADV_HD double sum_chunks(const double* scratch, int64_t sample, int64_t count) {
  double total = 0.0;
  for (int64_t c = 0; c < count; ++c) total += scratch[sample * count + c];
  return total;
}

// A sum that can be divided by: neither zero, nor infinite, nor NaN. Gradients of other samples add nothing.
template <class A>
ENSADV_HD bool is_usable(A v) {
  return v > A(0) && v < A(INFINITY);
}

}  // namespace ensadv
