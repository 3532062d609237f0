#include "block.h"

#include <algorithm>

namespace ptx_on_cpu {

Block::Block(const Launch& launch, Dim index, std::minstd_rand& random)
    : launch_(launch),
      index_(index),
      random_(random),
      shared_((launch.entry.static_shared + 15) / 16 * 16 + launch.dynamic_shared) {
  const uint64_t threads = launch.block.count();
  for (uint64_t first = 0; first < threads; first += kLanes)
    warps_.push_back(
        std::make_unique<Warp>(*this, int(first / kLanes), uint32_t(std::min<uint64_t>(kLanes, threads - first))));
}

std::array<uint32_t, std::size(kSpecials)> Block::specials(uint32_t thread) const {
  const Dim &b = launch_.block, &g = launch_.grid;
  return {thread % b.x, thread / b.x % b.y, thread / b.x / b.y, b.x, b.y, b.z, index_.x, index_.y, index_.z, g.x, g.y,
          g.z,          thread % kLanes,    thread / kLanes};
}

void Block::fail(const Instruction* i, int thread, const std::string& what) const {
  const auto triple = [](const Dim& d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  std::string where = launch_.entry.name + ", ";
  where += "line " + std::to_string(i->line) + " " + std::string(i->opcode) + ", ";
  if (i->source) where += i->source->substr(i->source->rfind('/') + 1) + ":" + std::to_string(i->source_line) + ", ";
  throw Fault(where + "block " + triple(index_) + ", thread " + std::to_string(thread) + ": " + what);
}

void Block::run() {
  for (;;) {
    std::shuffle(warps_.begin(), warps_.end(), random_);
    size_t left = 0;
    for (auto& w : warps_) left += w->run() == Warp::State::done;
    if (left == warps_.size()) return;
    release_barrier();
  }
}

// All threads must be there, and at the same one.
void Block::release_barrier() {
  const Warp* first = nullptr;
  bool missing = false;
  for (auto& w : warps_) {
    const uint64_t threads = launch_.block.count() - uint64_t(w->index()) * kLanes;
    missing |= uint32_t(__builtin_popcount(w->live())) != std::min<uint64_t>(kLanes, threads);
    if (w->live()) first = w.get();
  }
  const Instruction& i = launch_.entry.code[first->barrier_at()];
  if (missing) fail(&i, first->thread(__builtin_ctz(first->live())), "divergent barrier: other threads have left");
  for (auto& w : warps_)
    if (w->barrier_at() != first->barrier_at())
      fail(&i, w->thread(0), "divergent barrier: threads wait at different ones");
  ++epoch_;
  for (auto& w : warps_) w->pass_barrier();
}

void run(const Launch& launch) {
  std::minstd_rand random(launch.schedule.seed);
  ++launch.entry.launches;
  launch.entry.blocks += launch.grid.count();
  for (uint32_t z = 0; z < launch.grid.z; ++z)
    for (uint32_t y = 0; y < launch.grid.y; ++y)
      for (uint32_t x = 0; x < launch.grid.x; ++x) Block(launch, {x, y, z}, random).run();
}

}  // namespace ptx_on_cpu
