// Loads, stores and asynchronous copies to shared memory.
#include <cstring>

#include "access.h"
#include "opcodes.h"
#include "parse.h"

namespace ptx_on_cpu {
namespace {

// One element into its register, which may be wider.
void widen(Warp& w, const Instruction& i, int lane, int k, const uint8_t* from) {
  uint64_t v = 0;
  memcpy(&v, from, i.bytes);
  const int unused = 64 - 8 * i.bytes;
  if (i.is_signed) v = uint64_t(int64_t(v << unused) >> unused);
  if (i.op[k].exists()) memcpy(w.row<uint8_t>(i.op[k]) + lane * i.width, &v, i.width);
}

// Operands: what is loaded, and the address.
void load(Warp& w, const Instruction& i, Mask mask) {
  const uint32_t bytes = uint32_t(i.bytes) * i.elements;
  const Operand base = i.op[i.elements];
  count_traffic(w, i, mask, base, bytes);
  each_lane(mask, [&](int l) {
    const Lane lane(w, i, l);
    uint8_t data[32];
    lane.load(lane.reach(base), bytes, data);
    for (int k = 0; k < i.elements; ++k) widen(w, i, l, k, data + k * i.bytes);
  });
}

// Operands: the address, and what is stored.
void store(Warp& w, const Instruction& i, Mask mask) {
  const uint32_t bytes = uint32_t(i.bytes) * i.elements;
  count_traffic(w, i, mask, i.op[0], bytes);
  each_lane(mask, [&](int l) {
    const Lane lane(w, i, l);
    uint8_t data[32];
    for (int k = 0; k < i.elements; ++k) memcpy(data + k * i.bytes, w.row<uint8_t>(i.op[k + 1]) + l * i.width, i.bytes);
    lane.store(lane.reach(i.op[0]), bytes, data);
  });
}

// Operands: shared address, global address, bytes to read; the rest of i.bytes are zeros. Global memory is read at
// once, and shared memory written as late as it may be: when the copy is waited for.
void copy(Warp& w, const Instruction& i, Mask mask) {
  count_traffic(w, i, mask, i.op[1], i.bytes);
  each_lane(mask, [&](int l) {
    const Lane lane(w, i, l);
    const uint64_t to = w.row<uint32_t>(i.op[0])[l], from = w.row<uint64_t>(i.op[1])[l];
    const uint32_t bytes = i.op[2].exists() ? w.row<uint32_t>(i.op[2])[l] : i.bytes;
    if (bytes > i.bytes) lane.fail("copies more than it has room for");
    lane.must_be_aligned(to, i.bytes);
    lane.must_be_shared(to, i.bytes);
    Copy c{uint32_t(to), i.bytes, {}};
    if (bytes) {  // of an empty copy the address means nothing
      lane.must_be_aligned(from, i.bytes);
      lane.must_be_global(from, bytes);
      memcpy(c.data, reinterpret_cast<const void*>(from), bytes);
    }
    lane.must(w.block().shared().copy_begins(c.to, c.bytes, lane.who()));
    w.copies(l).push_back(c);
  });
}
void commit(Warp& w, const Instruction&, Mask mask) {
  each_lane(mask, [&](int l) { w.end_copy_group(l); });
}
void await_groups(Warp& w, const Instruction& i, Mask mask) {
  each_lane(mask, [&](int l) { w.await_copy_groups(l, size_t(i.offset)); });
}
void await_all(Warp& w, const Instruction&, Mask mask) {
  each_lane(mask, [&](int l) {
    w.end_copy_group(l);
    w.await_copy_groups(l, 0);
  });
}

bool describe_copy(std::string_view opcode, Instruction* i) {
  i->run = opcode == "cp.async.commit_group"                                                ? commit
           : opcode == "cp.async.wait_group"                                                ? await_groups
           : opcode == "cp.async.wait_all"                                                  ? await_all
           : opcode == "cp.async.cg.shared.global" || opcode == "cp.async.ca.shared.global" ? copy
                                                                                            : nullptr;
  return i->run != nullptr;
}

}  // namespace

// ld.space[.nc or .wb][.v2 or .v4].type, and nothing else.
bool describe_memory(std::string_view opcode, Instruction* i) {
  if (starts(opcode, "cp.async.")) return describe_copy(opcode, i);
  const std::vector<std::string_view> words = split(opcode, '.');
  if (words[0] != "ld" && words[0] != "st") return false;
  i->is_store = words[0] == "st";
  i->run = i->is_store ? store : load;
  size_t at = 1;
  const auto next = [&](std::string_view word) { return at < words.size() && words[at] == word && ++at; };
  i->space = next("global")                  ? Space::global
             : next("shared")                ? Space::shared
             : next("local")                 ? Space::local
             : !i->is_store && next("param") ? Space::param
                                             : Space::generic;
  if (i->space == Space::global) next(i->is_store ? "wb" : "nc");  // hints to the caches
  i->elements = next("v2") ? 2 : next("v4") ? 4 : 1;
  if (at + 1 != words.size() || words[at].size() < 2) return false;
  const char kind = words[at][0];
  const std::string_view bits = words[at].substr(1);
  i->bytes = bits == "8" ? 1 : bits == "16" ? 2 : bits == "32" ? 4 : bits == "64" ? 8 : 0;
  i->is_signed = kind == 's';
  return i->bytes && (kind == 'u' || kind == 's' || kind == 'b' || (kind == 'f' && i->bytes >= 4));
}

}  // namespace ptx_on_cpu
