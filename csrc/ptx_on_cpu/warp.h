// A warp: registers of 32 lanes, and where each of them stands in the program. Lanes at one place run together.
#pragma once

#include <deque>

#include "program.h"

namespace ptx_on_cpu {

class Block;

// An asynchronous copy to shared memory, under way.
struct Copy {
  uint32_t to, bytes;
  uint8_t data[16];
};

class Warp {
 public:
  enum class State { runs, waits, done };

  Warp(Block& block, int index, uint32_t threads);

  // Until all lanes have left, or wait at the block's barrier.
  State run();
  void pass_barrier();
  uint32_t barrier_at() const { return groups_.front().pc; }

  template <class T>
  T* row(Operand o) const {
    uint8_t* base = o.at & Operand::kConstant ? constants_ : registers_.get();
    return reinterpret_cast<T*>(base + (o.at & ~Operand::kConstant));
  }
  Block& block() const { return block_; }
  int index() const { return index_; }
  int thread(int lane) const { return index_ * kLanes + lane; }
  Mask live() const { return live_; }
  uint32_t epoch() const { return epoch_; }
  void synchronised() { ++epoch_; }  // by bar.warp.sync: what lanes wrote before is seen by the others after

  std::vector<Copy>& copies(int lane);  // of the group that is being made
  void end_copy_group(int lane) {
    copies(lane);
    copies_[size_t(lane)].emplace_back();
  }
  void await_copy_groups(int lane, size_t but);  // all but the last so many
  std::vector<uint8_t>& local(int lane);

 private:
  struct Group {
    uint32_t pc;
    Mask mask;
    bool waits;
  };

  bool pick(size_t* which);
  void run_group(size_t which);
  void branch(Group* g, const Instruction& i, Mask active);
  void leave(Group* g, Mask active);
  void synchronise(size_t which, const Instruction& i, Mask active);
  Mask needed(const Instruction& i, Mask active);
  void merge();
  void scatter();
  Mask true_lanes(Operand predicate) const;
  [[noreturn]] void stuck() const;

  Block& block_;
  const int index_;
  Mask live_;
  uint32_t epoch_ = 1;
  std::unique_ptr<uint8_t[]> registers_;
  uint8_t* constants_;
  std::vector<Group> groups_;
  std::vector<std::deque<std::vector<Copy>>> copies_;  // of each lane, groups of copies; empty: there were none
  std::vector<std::vector<uint8_t>> locals_;
};

}  // namespace ptx_on_cpu
