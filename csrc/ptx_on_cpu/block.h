// A block of threads: its warps, its shared memory, and the barriers that all of them must reach.
#pragma once

#include <array>
#include <random>

#include "global_memory.h"
#include "shared_memory.h"
#include "warp.h"

namespace ptx_on_cpu {

struct Dim {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t(x) * y * z; }
};

// How threads take turns. `seed` shuffles the warps whenever the block passes a barrier; `scatter` cuts warps into
// random parts besides, which run one after another and meet only where the program synchronises them.
struct Schedule {
  uint32_t seed = 1;
  bool scatter = false;
};

struct Launch {
  Entry& entry;
  Dim grid, block;
  uint32_t dynamic_shared = 0;
  const uint8_t* params = nullptr;
  GlobalMemory& memory;
  Schedule schedule;
  bool traffic = false;  // count sectors and bank conflicts
};

class Block {
 public:
  Block(const Launch& launch, Dim index, std::minstd_rand& random);

  void run();

  const Launch& launch() const { return launch_; }
  SharedMemory& shared() { return shared_; }
  std::minstd_rand& random() { return random_; }
  uint32_t epoch() const { return epoch_; }
  Dim index() const { return index_; }
  std::array<uint32_t, std::size(kSpecials)> specials(uint32_t thread) const;
  // "kernel, line 12, block (0, 0, 0), thread 7: what"
  [[noreturn]] void fail(const Instruction* i, int thread, const std::string& what) const;

 private:
  void release_barrier();

  const Launch& launch_;
  const Dim index_;
  std::minstd_rand& random_;
  SharedMemory shared_;
  std::vector<std::unique_ptr<Warp>> warps_;
  uint32_t epoch_ = 1;
};

// All blocks of a launch; throws the Fault that one of them met.
void run(const Launch& launch);

}  // namespace ptx_on_cpu
