// PTX text as statements. Nothing here knows what an instruction means.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "program.h"

namespace ptx_on_cpu {

// "@!%p1 ld.global.v2.f32 {%f1, %f2}, [%rd1+8];" Vectors are flattened; `vector` is how many the first of them holds.
struct Statement {
  uint32_t line = 0;
  uint32_t file = 0, source_line = 0;  // where the compiler says it comes from; 0: it does not
  std::string_view label;              // alone: a statement without an opcode
  std::string_view guard;
  bool guard_negated = false;
  std::string_view opcode;
  std::vector<std::string_view> operands;
  int vector = 0;             // registers in braces
  bool vector_first = false;  // the braces are the first operand
};

struct Variable {
  std::string_view name;
  Space space;
  uint32_t align = 1, bytes = 0;
  bool external = false;  // dynamic shared memory
};

struct Register {
  std::string_view prefix;  // "%r", for %r0 to %r<count - 1>; or a single name
  int count = 0;            // 0: a single one
  int width = 0;            // bytes of a lane's number; 1: a predicate
};

struct Function {
  std::string_view name;
  std::vector<Variable> params, variables;
  std::vector<Register> registers;
  std::vector<Statement> body;
  uint32_t most_threads = 1024;
};

struct Source {
  std::vector<Variable> variables;  // of all functions
  std::vector<Function> functions;
  std::map<uint32_t, std::string> files;
};

Source parse(std::string_view text);

std::vector<std::string_view> split(std::string_view text, char at);
std::string_view trimmed(std::string_view text);
bool starts(std::string_view text, std::string_view with);

}  // namespace ptx_on_cpu
