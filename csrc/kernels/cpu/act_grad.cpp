#include "../act_grad.h"

#include <cstring>

#include "../platform.h"
#include "loop.h"

namespace ensadv {
namespace {

// U: an unsigned integer of the elements' width. As many bits of the mask as it has go to as many elements: each lane
// keeps its own bit of them, which every instruction set can do. n: a multiple of that.
#define ENSADV_SELECT(U)                                                                    \
  ENSADV_CLONES void select(const U* grad, const uint8_t* mask, U* out, int64_t n) {        \
    constexpr int kBits = 8 * sizeof(U);                                                    \
    for (int64_t i = 0; i < n; i += kBits) {                                                \
      U bits;                                                                               \
      memcpy(&bits, mask + i / 8, sizeof(U));                                               \
      ENSADV_INDEPENDENT for (int j = 0; j < kBits; ++j)                                    \
        out[i + j] = bits & U(1) << j ? grad[i + j] : U(0);                                 \
    }                                                                                       \
  }
ENSADV_SELECT(uint16_t)
ENSADV_SELECT(uint32_t)
ENSADV_SELECT(uint64_t)
#undef ENSADV_SELECT

template <class U>
void run(const ActGradArgs& args, int64_t begin, int64_t end) {
  const U* grad = static_cast<const U*>(args.grad.data);
  U* out = static_cast<U*>(args.out.data);
  const int64_t first = begin * kMaskBlock, last = std::min(end * kMaskBlock, args.numel);
  const int64_t whole = first + (last - first) / kMaskBlock * kMaskBlock;
  select(grad + first, args.mask + first / 8, out + first, whole - first);
  for (int64_t i = whole; i < last; ++i) out[i] = args.mask[i / 8] >> i % 8 & 1 ? grad[i] : U(0);
}

}  // namespace

void act_grad_cpu(const ActGradArgs& args, int64_t begin, int64_t end) {
  switch (size_of(args.grad.dtype)) {
    case 2: return run<uint16_t>(args, begin, end);
    case 4: return run<uint32_t>(args, begin, end);
    default: return run<uint64_t>(args, begin, end);
  }
}

}  // namespace ensadv
