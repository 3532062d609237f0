#include "global_memory.h"

#include <algorithm>

namespace ptx_on_cpu {

void GlobalMemory::add(const void* base, size_t bytes) {
  const Buffer b{reinterpret_cast<uint64_t>(base), bytes};
  buffers_.insert(std::upper_bound(buffers_.begin(), buffers_.end(), b,
                                   [](const Buffer& x, const Buffer& y) { return x.base < y.base; }),
                  b);
}

bool GlobalMemory::remove(const void* base) {
  return std::erase_if(buffers_, [&](const Buffer& b) { return b.base == reinterpret_cast<uint64_t>(base); }) > 0;
}

// `hint` is where the last search ended: neighbouring accesses are mostly to one buffer.
bool GlobalMemory::holds(uint64_t address, uint64_t bytes, size_t* hint) const {
  const auto inside = [&](const Buffer& b) {
    return address - b.base < b.bytes && bytes <= b.bytes - (address - b.base);
  };
  if (*hint < buffers_.size() && inside(buffers_[*hint])) return true;
  const auto next = std::upper_bound(buffers_.begin(), buffers_.end(), address,
                                     [](uint64_t a, const Buffer& b) { return a < b.base; });
  if (next == buffers_.begin()) return false;
  *hint = size_t(next - buffers_.begin()) - 1;
  return inside(buffers_[*hint]);
}

size_t GlobalMemory::total() const {
  size_t sum = 0;
  for (const Buffer& b : buffers_) sum += b.bytes;
  return sum;
}

}  // namespace ptx_on_cpu
