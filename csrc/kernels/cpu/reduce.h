// The CPU side of reduce.h.
#pragma once

#include "../reduce.h"
#include "loop.h"

namespace ensadv {

// Folds the slots in the order of the CUDA block. Slots from `used` on count as zero and are not read.
double fold_slots(double* slots, int used);

// The sum of one chunk. values(first element, count, double* terms) writes the terms of up to kStrip elements.
template <class Values>
double sum_chunk(int64_t begin, int64_t end, Values values) {
  const int used = int(std::min<int64_t>(kSlots, end - begin));
  double slots[kSlots];
  std::fill(slots, slots + (used + kSlotPack - 1) / kSlotPack * kSlotPack, 0.0);
  double terms[kStrip];
  static_assert(kSlots % kStrip == 0);
  for (int64_t i = begin; i < end; i += kStrip) {
    const int n = int(std::min<int64_t>(kStrip, end - i));
    values(i, n, terms);
    double* slot = slots + (i - begin) % kSlots;
    ENSADV_INDEPENDENT for (int k = 0; k < n; ++k) slot[k] += terms[k];
  }
  return fold_slots(slots, used);
}

// Writes body(sample, first element, end) to scratch for each of the chunks [begin, end).
template <class Body>
void for_each_reduction_chunk(const Batch& batch, double* scratch, int64_t begin, int64_t end, Body body) {
  const Chunks chunks = chunks_of(batch.inner);
  for (int64_t k = begin; k < end; ++k) {
    const int64_t sample = k / chunks.count, first = k % chunks.count * chunks.size;
    const int64_t base = sample * batch.inner;
    scratch[k] = body(sample, base + first, base + std::min(first + chunks.size, batch.inner));
  }
}

}  // namespace ensadv
