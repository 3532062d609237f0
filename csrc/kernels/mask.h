// Masks: one bit per element, so that a ReLU's backward pass needs no activation. Bit e % 8 of byte e / 8 belongs to
// element e in memory; the bits beyond the last element are 0.
#pragma once

#include <cstdint>

#include "platform.h"

namespace ensadv {

constexpr int kMaskBits = 8;  // of a byte

// The bytes that the bits of n elements take.
ENSADV_HD constexpr int64_t mask_bytes(int64_t n) { return (n + kMaskBits - 1) / kMaskBits; }

// Threads share the work by blocks of so many elements, so that no two of them write to one byte.
constexpr int64_t kMaskBlock = 64;
constexpr int64_t mask_blocks(int64_t n) { return (n + kMaskBlock - 1) / kMaskBlock; }

}  // namespace ensadv
