#include "access.h"

#include <algorithm>
#include <cstring>
#include <set>

namespace ptx_on_cpu {
namespace {

std::string bytes_at(uint64_t at, uint32_t bytes) {
  char text[64];
  snprintf(text, sizeof text, "%u bytes at 0x%llx", bytes, static_cast<unsigned long long>(at));
  return text;
}

// The banks serve 128 bytes at a time, each of the 32 one word of 4: as many lanes as that is enough for make a pass,
// and one more for each other word that a bank is asked for.
uint64_t passes(const std::vector<uint64_t>& at, uint32_t bytes) {
  const size_t at_once = std::max<size_t>(1, std::min<size_t>(kLanes, 128 / bytes));
  uint64_t sum = 0;
  for (size_t first = 0; first < at.size(); first += at_once) {
    std::set<uint64_t> words[32];
    size_t most = 0;
    for (size_t l = first; l < std::min(at.size(), first + at_once); ++l)
      for (uint64_t word = at[l] / 4; word <= (at[l] + bytes - 1) / 4; ++word) words[word % 32].insert(word);
    for (const auto& bank : words) most = std::max(most, bank.size());
    sum += most;
  }
  return sum;
}

uint64_t sectors(const std::vector<uint64_t>& at, uint32_t bytes) {
  std::set<uint64_t> touched;
  for (uint64_t a : at)
    for (uint64_t s = a / 32; s <= (a + bytes - 1) / 32; ++s) touched.insert(s);
  return touched.size();
}

}  // namespace

void Lane::misaligned(uint64_t at, uint32_t bytes) const { fail("is misaligned: " + bytes_at(at, bytes)); }
void Lane::outside(uint64_t at, uint32_t bytes, const char* what) const {
  fail("touches " + bytes_at(at, bytes) + ", outside of " + what);
}

Reached Lane::reach(Operand base) const {
  uint64_t at = uint64_t(i_.offset);
  if (base.exists()) at += i_.address == 4 ? warp_.row<uint32_t>(base)[lane_] : warp_.row<uint64_t>(base)[lane_];
  if (i_.space != Space::generic) return {i_.space, at};
  if (at & kSharedWindow) return {Space::shared, at & ~kSharedWindow};
  if (at & kLocalWindow) return {Space::local, at & ~kLocalWindow};
  return {Space::global, at};
}

void Lane::load(const Reached& from, uint32_t bytes, void* out) const {
  must_be_aligned(from.at, bytes);
  if (from.space == Space::global) {
    must_be_global(from.at, bytes);
    memcpy(out, reinterpret_cast<const void*>(from.at), bytes);
  } else if (from.space == Space::shared) {
    must_be_shared(from.at, bytes);
    must(block().shared().read(uint32_t(from.at), bytes, who(), out));
  } else if (from.space == Space::param) {
    within(from.at, bytes, block().launch().entry.param_bytes, "the parameters");
    memcpy(out, block().launch().params + from.at, bytes);
  } else {
    within(from.at, bytes, warp_.local(lane_).size(), "local memory");
    memcpy(out, warp_.local(lane_).data() + from.at, bytes);
  }
}

void Lane::store(const Reached& to, uint32_t bytes, const void* data) const {
  must_be_aligned(to.at, bytes);
  if (to.space == Space::global) {
    must_be_global(to.at, bytes);
    memcpy(reinterpret_cast<void*>(to.at), data, bytes);
  } else if (to.space == Space::shared) {
    must_be_shared(to.at, bytes);
    must(block().shared().write(uint32_t(to.at), bytes, who(), data));
  } else {
    within(to.at, bytes, warp_.local(lane_).size(), "local memory");
    memcpy(warp_.local(lane_).data() + to.at, data, bytes);
  }
}

void count_traffic(Warp& w, const Instruction& i, Mask mask, Operand base, uint32_t bytes) {
  if (!w.block().launch().traffic || (i.space != Space::shared && i.space != Space::global)) return;
  std::vector<uint64_t> at;
  each_lane(mask, [&](int l) { at.push_back(Lane(w, i, l).reach(base).at); });
  if (i.space == Space::shared)
    i.count.passes += passes(at, bytes);
  else
    i.count.sectors += sectors(at, bytes);
}

}  // namespace ptx_on_cpu
