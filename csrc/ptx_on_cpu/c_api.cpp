// The device without the CUDA runtime, for tests that bring PTX as text (tests/ptx_on_cpu.py).
#include <cstdio>

#include "device.h"
#include "opcodes.h"

using ptx_on_cpu::Device;
using ptx_on_cpu::Entry;
using ptx_on_cpu::Module;

extern "C" {

const char* ptx_error() { return Device::get().error.c_str(); }

void* ptx_load(const char* text) { return Device::get().load(text); }

void ptx_forget_modules() { Device::get().forget(); }

void ptx_schedule(uint32_t seed, int scatter, int traffic) {
  Device::get().schedule = {seed, scatter != 0};
  Device::get().scatter_every = 0;
  Device::get().traffic = traffic != 0;
}

void ptx_add_buffer(const void* base, size_t bytes) { Device::get().memory.add(base, bytes); }
void ptx_remove_buffer(const void* base) { Device::get().memory.remove(base); }

// 0, or 1 where ptx_error() tells what went wrong. `grid` and `block` are three numbers each.
int ptx_launch(void* module, const char* name, const uint32_t* grid, const uint32_t* block, uint32_t shared,
               void* const* args) {
  auto& entries = static_cast<Module*>(module)->entries;
  const auto found = entries.find(name);
  if (found == entries.end()) {
    Device::get().error = std::string("no entry ") + name;
    return 1;
  }
  try {
    Device::get().launch(found->second, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, args);
  } catch (const ptx_on_cpu::Fault&) {
    return 1;
  }
  return 0;
}

void ptx_write_counts(const char* file) { Device::get().write_counts(file); }
void ptx_clear_counts() { Device::get().clear_counts(); }

// Every opcode of the table, one a line.
const char* ptx_opcodes() {
  static const std::string all = [] {
    std::string s;
    for (const auto& [name, d] : ptx_on_cpu::opcodes()) s += name + "\n";
    return s;
  }();
  return all.c_str();
}

}  // extern "C"
