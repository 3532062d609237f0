// Global memory: the host's own, of which only what was allocated may be touched, at its true size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ptx_on_cpu {

class GlobalMemory {
 public:
  void add(const void* base, size_t bytes);
  bool remove(const void* base);  // false: there is none
  bool holds(uint64_t address, uint64_t bytes, size_t* hint) const;
  size_t total() const;

 private:
  struct Buffer {
    uint64_t base, bytes;
  };
  std::vector<Buffer> buffers_;  // by address
};

}  // namespace ptx_on_cpu
