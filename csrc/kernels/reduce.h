// Sums over each sample, in an order that depends on the shape alone: the bits are the same on the CPU, on a GPU and
// for any number of threads.
//
// A sample is cut into chunks. Element e of a chunk goes to slot e % kSlots, and a slot adds up its elements in turn,
// in double. The slots are then folded by halving: first the kSlotPack slots of a thread, then the threads of a warp,
// then the warps. The chunks' sums lie in a scratch tensor [N, chunks]; those who use them add them up in order.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace ensadv {

constexpr int kReduceThreads = 256;  // of the CUDA block that sums a chunk
constexpr int kSlotPack = 8;
constexpr int kSlots = kReduceThreads * kSlotPack;
constexpr int64_t kMinChunk = 16384;
constexpr int64_t kMaxChunks = 64;

struct Chunks {
  int64_t size = kMinChunk;
  int64_t count = 1;
};

// How a sample of `inner` elements is cut. The Python ops allocate scratch by the same rule.
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

// Can one divide by this sum? Not if it is 0, infinite or NaN: such a sample's gradient counts as 0.
template <class A>
ENSADV_HD bool is_usable(A v) {
  return v > A(0) && v < A(INFINITY);
}

}  // namespace ensadv
