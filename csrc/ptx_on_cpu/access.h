// One access of one lane to memory of any kind, checked: bounds, alignment, and in shared memory what shared_memory.h
// knows.
#pragma once

#include "block.h"
#include "warp.h"

namespace ptx_on_cpu {

template <class Body>
void each_lane(Mask mask, Body body) {
  for (; mask; mask &= mask - 1) body(__builtin_ctz(mask));
}

struct Reached {
  Space space;
  uint64_t at;
};

class Lane {
 public:
  Lane(Warp& warp, const Instruction& i, int lane) : warp_(warp), i_(i), lane_(lane) {}

  // What an address means: a generic one says itself in which memory it lies.
  Reached reach(Operand base) const;
  void load(const Reached& from, uint32_t bytes, void* out) const;
  void store(const Reached& to, uint32_t bytes, const void* data) const;

  void must_be_aligned(uint64_t at, uint32_t bytes) const {
    if (at % bytes) misaligned(at, bytes);
  }
  void must_be_global(uint64_t at, uint32_t bytes) const {
    if (!block().launch().memory.holds(at, bytes, &i_.buffer)) outside(at, bytes, "every buffer");
  }
  void must_be_shared(uint64_t at, uint32_t bytes) const {
    within(at, bytes, block().shared().size(), "shared memory");
  }
  void must(const std::string& problem) const {
    if (!problem.empty()) fail(problem);
  }
  Access who() const { return {warp_.thread(lane_), block().epoch(), warp_.epoch()}; }
  [[noreturn]] void fail(const std::string& what) const { block().fail(&i_, warp_.thread(lane_), what); }

 private:
  Block& block() const { return warp_.block(); }
  void within(uint64_t at, uint64_t bytes, uint64_t size, const char* what) const {
    if (at > size || bytes > size - at) outside(at, uint32_t(bytes), what);
  }
  [[noreturn]] void misaligned(uint64_t at, uint32_t bytes) const;
  [[noreturn]] void outside(uint64_t at, uint32_t bytes, const char* what) const;

  Warp& warp_;
  const Instruction& i_;
  const int lane_;
};

// Adds what a request of these lanes costs: sectors of global memory, or passes over the banks of shared memory.
void count_traffic(Warp& w, const Instruction& i, Mask mask, Operand base, uint32_t bytes);

}  // namespace ptx_on_cpu
