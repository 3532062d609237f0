#include "warp.h"

#include <algorithm>
#include <cstring>

#include "block.h"

namespace ptx_on_cpu {

Warp::Warp(Block& block, int index, uint32_t threads)
    : block_(block),
      index_(index),
      live_(threads >= kLanes ? kAllLanes : (1u << threads) - 1),
      registers_(std::make_unique_for_overwrite<uint8_t[]>(block.launch().entry.register_bytes)),
      constants_(block.launch().entry.constants.data()),
      groups_{{0, live_, false}},
      locals_(kLanes) {
  for (uint32_t l = 0; l < kLanes; ++l) {
    const auto values = block.specials(uint32_t(index) * kLanes + l);
    for (size_t k = 0; k < values.size(); ++k)
      reinterpret_cast<uint32_t*>(registers_.get())[k * kLanes + l] = values[k];
  }
  scatter();
}

// Random parts of the warp, which then run one after another.
void Warp::scatter() {
  if (!block_.launch().schedule.scatter) return;
  const Mask part = uint32_t(block_.random()()) * 2654435761u;
  std::vector<Group> parts;
  for (const Group& g : groups_)
    for (Mask m : {g.mask & part, g.mask & ~part})
      if (m) parts.push_back({g.pc, m, g.waits});
  groups_ = std::move(parts);
}

Warp::State Warp::run() {
  size_t which;
  while (pick(&which)) run_group(which);
  if (groups_.empty()) return State::done;
  merge();
  const Instruction& i = block_.launch().entry.code[groups_[0].pc];
  if (groups_.size() > 1 || i.kind != Kind::barrier) stuck();
  return State::waits;
}

void Warp::pass_barrier() {
  ++groups_[0].pc;
  groups_[0].waits = false;
  scatter();
}

// Nothing can go on: some lanes wait for others which never come.
void Warp::stuck() const {
  const Group& g = groups_[0];
  std::string others;
  for (size_t k = 1; k < groups_.size(); ++k)
    others += (k > 1 ? ", " : "") + std::to_string(block_.launch().entry.code[groups_[k].pc].line);
  block_.fail(
      &block_.launch().entry.code[g.pc], thread(__builtin_ctz(g.mask)),
      others.empty() ? "waits for lanes that never come" : "divergent: other lanes of the warp wait at line " + others);
}

// The lanes that are furthest behind, so that those ahead wait where paths meet; a random group where warps are
// scattered. Groups that meet become one, unless scattered ones run.
bool Warp::pick(size_t* which) {
  const bool scattered = block_.launch().schedule.scatter;
  if (!scattered && groups_.size() > 1) merge();
  size_t seen = 0;
  bool found = false;
  for (size_t k = 0; k < groups_.size(); ++k) {
    if (groups_[k].waits) continue;
    ++seen;
    if (!found || (scattered ? block_.random()() % seen == 0 : groups_[k].pc < groups_[*which].pc)) *which = k;
    found = true;
  }
  return found;
}

void Warp::merge() {
  for (size_t a = 0; a < groups_.size(); ++a)
    for (size_t b = groups_.size(); --b > a;)
      if (groups_[a].pc == groups_[b].pc && groups_[a].waits == groups_[b].waits) {
        groups_[a].mask |= groups_[b].mask;
        groups_.erase(groups_.begin() + long(b));
      }
}

Mask Warp::true_lanes(Operand predicate) const {
  const uint8_t* p = row<uint8_t>(predicate);
  Mask m = 0;
  for (int part = 0; part < kLanes; part += 8) {
    uint64_t eight;  // bytes whose lowest bits are gathered into the uppermost byte; lanes that have left hold anything
    memcpy(&eight, p + part, 8);
    m |= Mask((eight & 0x0101010101010101u) * 0x0102040810204080u >> 56) << part;
  }
  return m;
}

// The lanes that do not go where the others go become a group of their own.
void Warp::branch(Group* g, const Instruction& i, Mask active) {
  i.count.taken += uint64_t(__builtin_popcount(active));
  i.count.threads += uint64_t(__builtin_popcount(g->mask & ~active));
  if (active && active != g->mask) groups_.push_back({i.target, active, false});
  *g = {active == g->mask ? i.target : g->pc + 1, active == g->mask ? active : g->mask & ~active, false};
}

void Warp::leave(Group* g, Mask active) {
  for (Mask m = active; m; m &= m - 1) await_copy_groups(__builtin_ctz(m), 0);
  live_ &= ~active;
  g->mask &= ~active;
  ++g->pc;
}

// Until the group has left, waits, or has come to where another one stands.
void Warp::run_group(size_t which) {
  const Instruction* code = block_.launch().entry.code.data();
  Group g = groups_[which];
  uint32_t limit = UINT32_MAX;
  const auto look = [&] {
    if (!block_.launch().schedule.scatter)
      for (size_t k = 0; k < groups_.size(); ++k)
        if (k != which && !groups_[k].waits) limit = std::min(limit, groups_[k].pc);
  };
  for (look(); g.pc < limit;) {
    const Instruction& i = code[g.pc];
    Mask active = g.mask;
    if (i.guard.exists()) active &= i.guard_negated ? ~true_lanes(i.guard) : true_lanes(i.guard);
    ++i.count.warps;
    i.count.threads += uint64_t(__builtin_popcount(active));
    if (i.kind == Kind::plain) {
      if (active) i.run(*this, i, active);
      ++g.pc;
    } else if (i.kind == Kind::branch) {
      branch(&g, i, active);
      if (active && groups_.size() > 1) look();
    } else if (i.kind == Kind::leave) {
      leave(&g, active);
      if (!g.mask) return void(groups_.erase(groups_.begin() + long(which)));
    } else if (i.kind == Kind::trap) {
      if (active) block_.fail(&i, thread(__builtin_ctz(active)), "trap");
      ++g.pc;
    } else {
      if (active != g.mask) block_.fail(&i, thread(__builtin_ctz(g.mask)), "only a part of the lanes synchronises");
      groups_[which] = g;
      return synchronise(which, i, active);
    }
  }
  groups_[which] = g;
}

// The group waits until all lanes that the instruction names are there; then it runs.
void Warp::synchronise(size_t which, const Instruction& i, Mask active) {
  groups_[which].waits = true;
  if (i.kind == Kind::barrier) return;
  const uint32_t pc = groups_[which].pc;
  merge();
  const auto g = std::find_if(groups_.begin(), groups_.end(), [&](const Group& x) { return x.pc == pc && x.waits; });
  if (g->mask != needed(i, active)) return;
  i.run(*this, i, g->mask);
  g->waits = false;
  ++g->pc;
}

// Lanes that have left are not waited for.
Mask Warp::needed(const Instruction& i, Mask active) {
  if (i.members < 0) return kAllLanes;
  const uint32_t* members = row<uint32_t>(i.op[i.members]);
  const Mask first = members[__builtin_ctz(active)];
  for (Mask m = active; m; m &= m - 1)
    if (members[__builtin_ctz(m)] != first || !(first >> __builtin_ctz(m) & 1))
      block_.fail(&i, thread(__builtin_ctz(m)), "lanes disagree on who takes part");
  return first & live_;
}

void Warp::await_copy_groups(int lane, size_t but) {
  if (copies_.empty()) return;
  auto& groups = copies_[size_t(lane)];
  for (; groups.size() > but + 1; groups.pop_front())
    for (const Copy& c : groups.front())
      block_.shared().copy_ends(c.to, c.bytes, {thread(lane), block_.epoch(), epoch_}, c.data);
}

std::vector<Copy>& Warp::copies(int lane) {
  if (copies_.empty()) copies_.assign(kLanes, std::deque<std::vector<Copy>>(1));
  return copies_[size_t(lane)].back();
}

std::vector<uint8_t>& Warp::local(int lane) {
  std::vector<uint8_t>& bytes = locals_[size_t(lane)];
  if (bytes.empty()) bytes.resize(block_.launch().entry.local_bytes);
  return bytes;
}

}  // namespace ptx_on_cpu
