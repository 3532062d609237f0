// A PTX module, decoded: what parse.cpp and decode.cpp make of the text, and what warp.cpp executes.
//
// A register is a row: one number for each lane of a warp, side by side, so that an instruction is a loop over lanes.
// Immediates are rows too, of equal numbers, which all warps share.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace ptx_on_cpu {

constexpr int kLanes = 32;
using Mask = uint32_t;  // bit l: lane l
constexpr Mask kAllLanes = 0xffffffffu;

// Generic addresses: beyond all that a host pointer may be.
constexpr uint64_t kSharedWindow = 1ull << 60, kLocalWindow = 1ull << 61;

class Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, Mask);

// What is wrong with a program's text, or with what it does when it runs.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where a row lies: bytes from the start of the warp's registers, or of the entry's constants.
struct Operand {
  static constexpr uint32_t kConstant = 0x80000000u, kNone = 0xffffffffu;
  uint32_t at = kNone;
  bool exists() const { return at != kNone; }
};

enum class Kind : uint8_t { plain, branch, leave, warp_sync, barrier, trap };
enum class Space : uint8_t { global, shared, param, local, generic };

// What has run of an instruction; for a load or store, the memory that it touched.
struct Count {
  uint64_t warps = 0, threads = 0, taken = 0;
  uint64_t sectors = 0, passes = 0;  // 32-byte sectors of global memory; trips to the banks of shared memory
};

struct Instruction {
  static constexpr int kMostOperands = 16;
  Handler run = nullptr;
  Operand op[kMostOperands];
  int64_t offset = 0;   // added to an address
  uint32_t target = 0;  // of a branch
  Operand guard;
  bool guard_negated = false;
  Kind kind = Kind::plain;
  Space space = Space::global;
  uint8_t bytes = 0;     // of one element of a load or store, or of an asynchronous copy
  uint8_t elements = 1;  // of its vector
  uint8_t width = 0;     // of the registers loaded or stored
  uint8_t address = 8;   // bytes of the register that holds the address
  int8_t members = -1;   // the operand that names the lanes of a warp-wide instruction; -1: all lanes
  bool is_signed = false, is_store = false;
  uint32_t line = 0, source_line = 0;   // of the PTX; of the file it was made from
  const std::string* source = nullptr;  // that file
  std::string_view opcode;
  mutable Count count;
  mutable size_t buffer = 0;  // the global buffer met last
};

struct Param {
  uint32_t offset, size;
};

struct Entry {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Param> params;
  uint32_t param_bytes = 0;
  uint32_t register_bytes = 0;
  std::vector<uint8_t> constants;
  uint32_t static_shared = 0;  // dynamic shared memory follows
  uint32_t local_bytes = 0;    // of a thread
  uint32_t most_threads = 1024;
  uint64_t launches = 0, blocks = 0;
};

struct Module {
  std::string text;
  std::map<uint32_t, std::string> files;
  std::unordered_map<std::string, Entry> entries;
};

// Throws a Fault for whatever it does not know.
std::unique_ptr<Module> load_module(std::string text);

// Special registers, each a row of 32-bit numbers at the start of a warp's registers.
constexpr const char* kSpecials[] = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
                                     "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
                                     "%nctaid.y", "%nctaid.z", "%laneid",  "%warpid"};

}  // namespace ptx_on_cpu
