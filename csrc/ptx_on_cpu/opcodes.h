// The table of instructions: an opcode with all its modifiers, as one string, and what it does. What is not in the
// table is no instruction, so no modifier can be overlooked.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "program.h"
#include "warp.h"

namespace ptx_on_cpu {

struct Slot {
  uint8_t width;  // bytes of a lane's number; 1: a predicate
  bool is_float;
};

struct Definition {
  Handler run = nullptr;
  Kind kind = Kind::plain;
  std::vector<Slot> slots;  // the operands, results first
};

using Opcodes = std::unordered_map<std::string, Definition>;
const Opcodes& opcodes();

using Pred = bool;
static_assert(sizeof(Pred) == 1);

template <class T>
constexpr Slot kSlot = {uint8_t(sizeof(T)), std::is_floating_point_v<T>};

// d[lane] = f(s[lane]...) for the lanes of the mask.
template <class F, class D, class... S, size_t... k>
void over_lanes(Warp& w, const Instruction& i, Mask mask, std::index_sequence<k...>) {
  D* d = w.row<D>(i.op[0]);
  const std::tuple<const S*...> s{w.row<S>(i.op[k + 1])...};
  if (mask == kAllLanes) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = F{}(std::get<k>(s)[l]...);
  } else {
    for (; mask; mask &= mask - 1) {
      const int l = __builtin_ctz(mask);
      d[l] = F{}(std::get<k>(s)[l]...);
    }
  }
}
template <class F, class D, class... S>
void by_lane(Warp& w, const Instruction& i, Mask mask) {
  over_lanes<F, D, S...>(w, i, mask, std::index_sequence_for<S...>());
}

// define<D, S...>(table, "add.s32", [](S... s) -> D {...})
template <class D, class... S, class F>
void define(Opcodes& table, const std::string& name, F) {
  if (!table.emplace(name, Definition{by_lane<F, D, S...>, Kind::plain, {kSlot<D>, kSlot<S>...}}).second)
    throw std::logic_error(name + " is defined twice");
}

void define_integers(Opcodes& table);
void define_bits(Opcodes& table);
void define_floats(Opcodes& table);
void define_comparisons(Opcodes& table);
void define_conversions(Opcodes& table);
void define_halves(Opcodes& table);
void define_warp_wide(Opcodes& table);

// Loads, stores and asynchronous copies have too many forms for a table: false if `opcode` is none of them.
bool describe_memory(std::string_view opcode, Instruction* i);

}  // namespace ptx_on_cpu
