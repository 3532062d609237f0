#include "shared_memory.h"

#include <algorithm>
#include <cstring>

namespace ptx_on_cpu {
namespace {

constexpr int kLanes = 32;

}  // namespace

// body(word, its touched bytes as bits) until one of them complains.
template <class Body>
std::string SharedMemory::over_words(uint32_t at, uint32_t bytes, Body body) {
  for (uint32_t w = at / 4; w * 4 < at + bytes; ++w) {
    const uint32_t from = std::max(at, w * 4) - w * 4, to = std::min(at + bytes, w * 4 + 4) - w * 4;
    const std::string problem = body(words_[w], uint8_t((0xf << from) & (0xf >> (4 - to))));
    if (!problem.empty()) return problem;
  }
  return {};
}

bool SharedMemory::races(const Mark& mark, uint8_t bytes, const Access& by) {
  if (mark.last.thread < 0 || mark.last.epoch != by.epoch || !(mark.bytes & bytes)) return false;
  if (mark.warps || mark.last.thread / kLanes != by.thread / kLanes) return true;
  return mark.last.warp_epoch == by.warp_epoch && (mark.lanes || mark.last.thread != by.thread);
}

void SharedMemory::note(Mark* mark, uint8_t bytes, const Access& by) {
  const Access& last = mark->last;
  if (last.thread < 0 || last.epoch != by.epoch) {
    *mark = {by, bytes};
    return;
  }
  const bool same_warp = last.thread / kLanes == by.thread / kLanes;
  mark->warps |= !same_warp;
  mark->lanes = same_warp && last.warp_epoch == by.warp_epoch && (mark->lanes || last.thread != by.thread);
  mark->bytes |= bytes;
  mark->last = by;
}

std::string SharedMemory::race(const char* what, const Mark& mark) {
  return std::string("race: ") + what + " thread " + std::to_string(mark.last.thread) +
         (mark.lanes || mark.warps ? " and others" : "") + " with no barrier between";
}

std::string SharedMemory::read(uint32_t at, uint32_t bytes, const Access& by, void* out) {
  memcpy(out, data_.data() + at, bytes);
  return over_words(at, bytes, [&](Word& w, uint8_t bits) -> std::string {
    if (w.awaited & bits) return "reads shared memory that an asynchronous copy is still to fill";
    if ((w.initialised & bits) != bits) return "reads shared memory that nobody wrote";
    if (races(w.written, bits, by)) return race("reads what was written by", w.written);
    note(&w.read, bits, by);
    return {};
  });
}

std::string SharedMemory::write(uint32_t at, uint32_t bytes, const Access& by, const void* data) {
  const std::string problem = copy_begins(at, bytes, by);
  copy_ends(at, bytes, by, data);
  return problem;
}

std::string SharedMemory::copy_begins(uint32_t at, uint32_t bytes, const Access& by) {
  return over_words(at, bytes, [&](Word& w, uint8_t bits) -> std::string {
    if (w.awaited & bits) return "writes shared memory that an asynchronous copy is still to fill";
    if (races(w.written, bits, by)) return race("overwrites what was written by", w.written);
    if (races(w.read, bits, by)) return race("overwrites what was read by", w.read);
    note(&w.written, bits, by);
    w.awaited |= bits;
    return {};
  });
}

void SharedMemory::copy_ends(uint32_t at, uint32_t bytes, const Access& by, const void* data) {
  memcpy(data_.data() + at, data, bytes);
  over_words(at, bytes, [&](Word& w, uint8_t bits) -> std::string {
    note(&w.written, bits, by);
    w.initialised |= bits;
    w.awaited &= uint8_t(~bits);
    return {};
  });
}

}  // namespace ptx_on_cpu
