// Statements into instructions: registers get places, names get addresses, opcodes are looked up.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <map>

#include "opcodes.h"
#include "parse.h"

namespace ptx_on_cpu {

const Opcodes& opcodes() {
  static const Opcodes table = [] {
    Opcodes t;
    define_integers(t);
    define_bits(t);
    define_floats(t);
    define_comparisons(t);
    define_conversions(t);
    define_halves(t);
    define_warp_wide(t);
    return t;
  }();
  return table;
}

namespace {

// The bits of "12", "-1", "0x1f", "0f3F800000" or "0d3FF0000000000000".
uint64_t immediate(std::string_view text, const Slot& slot) {
  const std::string s(text);
  char* end = nullptr;
  uint64_t bits;
  const bool single = starts(text, "0f"), twofold = starts(text, "0d");
  if (single || twofold) {
    if (!slot.is_float) throw Fault("a float where none belongs: " + s);
    bits = std::strtoull(s.c_str() + 2, &end, 16);
    if (single && slot.width == 8) bits = std::bit_cast<uint64_t>(double(std::bit_cast<float>(uint32_t(bits))));
    if (twofold && slot.width != 8) throw Fault("a double where none belongs: " + s);
  } else {
    if (slot.is_float) throw Fault("an integer where a float belongs: " + s);
    bits = s[0] == '-' ? uint64_t(std::strtoll(s.c_str(), &end, 0)) : std::strtoull(s.c_str(), &end, 0);
  }
  if (*end == 'U') ++end;
  if (*end || s.empty()) throw Fault("cannot read " + s);
  return slot.width == 1 ? bits != 0 : bits;  // a predicate may be written as -1
}

class Decoder {
 public:
  Decoder(const Source& source, const Function& function, const std::map<uint32_t, std::string>& files, Entry* entry)
      : function_(function), files_(files), entry_(*entry) {
    entry_.name = function.name;
    entry_.most_threads = function.most_threads;
    place_registers();
    place_variables(source);
  }

  void run() {
    for (const Statement& s : function_.body) {
      try {
        if (s.label.empty())
          decode(s);
        else
          labels_[s.label] = uint32_t(entry_.code.size());
      } catch (const Fault& f) {
        throw Fault(entry_.name + ", line " + std::to_string(s.line) + ", " + std::string(s.opcode) + ": " + f.what());
      }
    }
    for (const auto& [at, label] : branches_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) throw Fault(entry_.name + ": unknown label " + std::string(label));
      entry_.code[at].target = found->second;
    }
    Instruction end;
    end.kind = Kind::leave;
    end.opcode = "ret";
    entry_.code.push_back(end);
  }

 private:
  struct Row {
    uint32_t at;
    int width;
  };

  void add_row(std::string name, int width) {
    entry_.register_bytes = (entry_.register_bytes + 15) / 16 * 16;
    const auto known = rows_.find(name);
    if (known != rows_.end() && known->second.width != width) throw Fault(name + " is two registers");
    if (known != rows_.end()) return;
    rows_.emplace(std::move(name), Row{entry_.register_bytes, width});
    entry_.register_bytes += uint32_t(width) * kLanes;
  }
  void place_registers() {
    for (const char* special : kSpecials) add_row(special, 4);
    for (const Register& r : function_.registers) {
      if (r.count == 0) add_row(std::string(r.prefix), r.width);
      for (int k = 0; k < r.count; ++k) add_row(std::string(r.prefix) + std::to_string(k), r.width);
    }
  }
  static uint32_t place(const Variable& v, uint32_t* end) {
    *end = (*end + v.align - 1) / v.align * v.align;
    *end += v.bytes;
    return *end - v.bytes;
  }
  void place_variables(const Source& source) {
    for (const Variable& p : function_.params) {
      const uint32_t at = place(p, &entry_.param_bytes);
      addresses_[p.name] = at;
      entry_.params.push_back({at, p.bytes});
    }
    const auto add = [&](const Variable& v) {
      if (v.external) return;
      addresses_[v.name] = place(v, v.space == Space::local ? &entry_.local_bytes : &entry_.static_shared);
    };
    for (const Variable& v : function_.variables) add(v);
    for (const Variable& v : source.variables)  // of the file: only what this function names takes room
      if (uses(v.name)) add(v);
    for (const Variable& v : source.variables)
      if (v.external) addresses_[v.name] = (entry_.static_shared + 15) / 16 * 16;
  }
  bool uses(std::string_view name) const {
    for (const Statement& s : function_.body)
      for (std::string_view o : s.operands)
        if (o.find(name) != o.npos) return true;
    return false;
  }

  Operand constant(uint64_t bits, int width) {
    const auto [known, fresh] = constants_.try_emplace({bits, width}, uint32_t(entry_.constants.size()));
    for (int l = 0; fresh && l < kLanes; ++l) {
      const auto* from = reinterpret_cast<const uint8_t*>(&bits);
      entry_.constants.insert(entry_.constants.end(), from, from + width);
    }
    return {known->second | Operand::kConstant};
  }
  const Row* row(std::string_view name) const {
    const auto found = rows_.find(std::string(name));
    return found == rows_.end() ? nullptr : &found->second;
  }
  // A register, of this width; else an immediate or a name's address.
  Operand operand(std::string_view text, const Slot& slot) {
    if (text == "_") return {};
    if (const Row* r = row(text)) {
      if (r->width != slot.width) throw Fault(std::string(text) + " has another size than the instruction");
      return {r->at};
    }
    if (text[0] == '%' || text[0] == '!') throw Fault("unknown register " + std::string(text));
    const auto plus = text.find('+');
    const auto named = addresses_.find(trimmed(text.substr(0, plus)));
    if (named != addresses_.end())
      return constant(named->second + (plus == text.npos ? 0 : immediate(text.substr(plus + 1), slot)), slot.width);
    return constant(immediate(text, slot), slot.width);
  }

  void decode(const Statement& s) {
    if (s.vector == 2 && starts(s.opcode, "mov.")) return decode_pair(s);
    Instruction i = begin(s);
    if (s.opcode == "bra" || s.opcode == "bra.uni") {
      i.kind = Kind::branch;
      branches_.emplace_back(entry_.code.size(), s.operands.at(0));
    } else if (s.opcode == "ret" || s.opcode == "exit") {
      i.kind = Kind::leave;
    } else if (s.opcode == "trap") {
      i.kind = Kind::trap;
    } else if (s.opcode == "bar.sync") {
      if (s.operands.size() != 1 || s.operands[0] != "0") throw Fault("only barrier 0 of all threads is known");
      i.kind = Kind::barrier;
    } else if (describe_memory(s.opcode, &i)) {
      decode_memory(s, &i);
    } else {
      decode_by_table(s, &i);
    }
    entry_.code.push_back(i);
  }
  Instruction begin(const Statement& s) {
    Instruction i;
    i.line = s.line;
    i.source_line = s.source_line;
    const auto file = files_.find(s.file);
    if (file != files_.end()) i.source = &file->second;
    i.opcode = s.opcode;
    if (!s.guard.empty()) i.guard = operand(s.guard, kSlot<Pred>);
    i.guard_negated = s.guard_negated;
    return i;
  }

  void decode_by_table(const Statement& s, Instruction* i) {
    const auto found = opcodes().find(std::string(s.opcode));
    if (found == opcodes().end()) throw Fault("unknown instruction");
    const Definition& d = found->second;
    i->run = d.run;
    i->kind = d.kind;
    const bool shuffle = starts(s.opcode, "shfl.") && s.operands.size() + 1 == d.slots.size();  // without a predicate
    if (s.operands.size() + shuffle != d.slots.size()) throw Fault("another number of operands");
    for (size_t k = 0, slot = 0; k < s.operands.size(); ++k, ++slot) {
      if (shuffle && k == 1) ++slot;
      std::string_view text = s.operands[k];
      if (starts(s.opcode, "ldmatrix.") && k == 4) text = address(text, i);
      const Row* r = row(text);
      if (starts(s.opcode, "cvt.") && k == 1 && r && r->width > d.slots[slot].width)
        i->op[slot] = lower_part(s, r, d.slots[slot].width);
      else
        i->op[slot] = text.empty() ? Operand{} : operand(text, d.slots[slot]);
    }
    if (d.kind == Kind::warp_sync && !starts(s.opcode, "mma.") && !starts(s.opcode, "ldmatrix."))
      i->members = int8_t(d.slots.size() - 1);
    if (starts(s.opcode, "ldmatrix.")) i->space = Space::shared;
  }

  // cvt takes a number from a wider register, too: another instruction before it cuts that down.
  Operand lower_part(const Statement& s, const Row* r, int width) {
    Operand from{r->at};
    for (int w = r->width; w > width; w /= 2) {
      Instruction i = begin(s);
      i.run = opcodes().at(w == 8 ? "low.b64" : "low.b32").run;
      i.op[0] = scratch(w / 2);
      i.op[1] = from;
      from = i.op[0];
      entry_.code.push_back(i);
    }
    return from;
  }

  void decode_pair(const Statement& s) {
    const std::string type(s.opcode.substr(4));
    const int width = type == "b32" ? 4 : type == "b64" ? 8 : throw Fault("unknown pair");
    const Slot whole{uint8_t(width), false}, half{uint8_t(width / 2), false};
    const auto emit = [&](const std::string& name, std::initializer_list<Operand> operands) {
      Instruction i = begin(s);
      i.run = opcodes().at(name + type).run;
      std::copy(operands.begin(), operands.end(), i.op);
      entry_.code.push_back(i);
    };
    const auto sink = [&](std::string_view text) { return text == "_" ? scratch(width / 2) : operand(text, half); };
    if (!s.vector_first)
      return emit("pack.", {operand(s.operands[0], whole), operand(s.operands[1], half), operand(s.operands[2], half)});
    // The register may be one of its own halves only where the machine has such: it has not.
    emit("low.", {sink(s.operands[0]), operand(s.operands[2], whole)});
    emit("high.", {sink(s.operands[1]), operand(s.operands[2], whole)});
  }
  Operand scratch(int width) {
    const std::string name = "(scratch " + std::to_string(width) + ")";
    add_row(name, width);
    return {row(name)->at};
  }

  // "[%rd1+8]", "[name+8]", "[8]": the register, if there is one; the rest goes into the offset.
  std::string_view address(std::string_view text, Instruction* i) const {
    if (text.size() < 2 || text.front() != '[' || text.back() != ']') throw Fault("no address: " + std::string(text));
    text = trimmed(text.substr(1, text.size() - 2));
    const auto plus = text.find('+');
    std::string_view base = trimmed(text.substr(0, plus));
    if (plus != text.npos) i->offset = int64_t(immediate(trimmed(text.substr(plus + 1)), {8, false}));
    const auto named = addresses_.find(base);
    if (named != addresses_.end()) {
      i->offset += named->second;
      base = {};
    } else if (base[0] != '%') {
      i->offset += int64_t(immediate(base, {8, false}));
      base = {};
    }
    const Row* r = base.empty() ? nullptr : row(base);
    if (!base.empty() && !r) throw Fault("unknown register " + std::string(base));
    i->address = uint8_t(r ? r->width : 8);
    return base;
  }
  Operand base_operand(std::string_view text, Instruction* i) {
    const std::string_view base = address(text, i);
    return base.empty() ? Operand{} : operand(base, {i->address, false});
  }

  void decode_memory(const Statement& s, Instruction* i) {
    if (starts(s.opcode, "cp.async.")) return decode_copy(s, i);
    const size_t count = i->elements, first = i->is_store ? 1 : 0;
    if (s.operands.size() != count + 1 || (count > 1) != (s.vector > 0)) throw Fault("another number of operands");
    for (size_t k = 0; k < count; ++k) {
      const Row* r = row(s.operands[first + k]);
      if (r && k && i->width && i->width != r->width) throw Fault("registers of different sizes");
      if (r) i->width = uint8_t(r->width);
    }
    if (i->width == 0) i->width = i->bytes;
    if (i->width < i->bytes) throw Fault("a register too small");
    const bool is_float = s.opcode[s.opcode.rfind('.') + 1] == 'f';
    for (size_t k = 0; k < count; ++k) i->op[first + k] = operand(s.operands[first + k], {i->width, is_float});
    i->op[i->is_store ? 0 : count] = base_operand(s.operands[i->is_store ? 0 : count], i);
  }
  void decode_copy(const Statement& s, Instruction* i) {
    if (s.operands.empty()) return;
    if (s.operands.size() == 1) {
      i->offset = int64_t(immediate(s.operands[0], {8, false}));
      return;
    }
    if (s.operands.size() < 3 || s.operands.size() > 4) throw Fault("another number of operands");
    i->bytes = uint8_t(immediate(s.operands[2], {4, false}));
    const bool all = starts(s.opcode, "cp.async.cg.");  // past the first cache: 16 bytes alone
    if (!(i->bytes == 16 || (!all && (i->bytes == 4 || i->bytes == 8)))) throw Fault("no such size of a copy");
    Instruction to, from;
    i->op[0] = base_operand(s.operands[0], &to);
    i->op[1] = base_operand(s.operands[1], &from);
    if (to.offset || from.offset || to.address != 4 || from.address != 8)
      throw Fault("addresses in plain registers wanted");
    if (s.operands.size() == 4) i->op[2] = operand(s.operands[3], {4, false});
  }

  const Function& function_;
  const std::map<uint32_t, std::string>& files_;
  Entry& entry_;
  std::unordered_map<std::string, Row> rows_;
  std::map<std::string_view, uint32_t> labels_, addresses_;
  std::vector<std::pair<size_t, std::string_view>> branches_;
  std::map<std::pair<uint64_t, int>, uint32_t> constants_;
};

}  // namespace

std::unique_ptr<Module> load_module(std::string text) {
  auto module = std::make_unique<Module>();
  module->text = std::move(text);
  Source source = parse(module->text);
  module->files = std::move(source.files);
  for (const Function& f : source.functions)
    Decoder(source, f, module->files, &module->entries[std::string(f.name)]).run();
  return module;
}

}  // namespace ptx_on_cpu
