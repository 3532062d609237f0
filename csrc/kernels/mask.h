// Masks: one bit per element, so that a ReLU's backward pass needs no activation. Bit e % 8 of byte e / 8 belongs to
// the e-th element in memory; the bits beyond the last element are 0.
#pragma once

#include <cstdint>

namespace ensadv {

// The work is shared out by blocks of so many elements: then no two threads write to one byte.
constexpr int64_t kMaskBlock = 64;

constexpr int64_t mask_bytes(int64_t numel) { return (numel + 7) / 8; }
constexpr int64_t mask_blocks(int64_t numel) { return (numel + kMaskBlock - 1) / kMaskBlock; }

}  // namespace ensadv
