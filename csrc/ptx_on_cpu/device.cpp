#include "device.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

namespace ptx_on_cpu {
namespace {

uint32_t number_of(const char* variable, uint32_t otherwise) {
  const char* text = getenv(variable);
  return text ? uint32_t(strtoul(text, nullptr, 10)) : otherwise;
}

// PTX line, opcode, bytes, warps, threads, taken, sectors, passes, is guarded, source file, its line
void write_line(FILE* out, const Instruction& i) {
  using ull = unsigned long long;
  const Count& c = i.count;
  fprintf(out, "%u %.*s %d %llu %llu %llu %llu %llu %d %s %u\n", i.line, int(i.opcode.size()), i.opcode.data(),
          i.bytes * i.elements, ull(c.warps), ull(c.threads), ull(c.taken), ull(c.sectors), ull(c.passes),
          int(i.guard.exists()), i.source ? i.source->substr(i.source->rfind('/') + 1).c_str() : "-", i.source_line);
}

}  // namespace

Device& Device::get() {
  static Device device;
  return device;
}

Device::Device() {
  schedule.seed = number_of("PTX_ON_CPU_SEED", 1);
  scatter_every = number_of("PTX_ON_CPU_SCATTER", 8);
  traffic = number_of("PTX_ON_CPU_TRAFFIC", 0);
}

Device::~Device() {
  if (const char* file = getenv("PTX_ON_CPU_COUNTS")) write_counts(file);
}

// The text that PTX_ON_CPU_MODULES has for this module; so a test runs a program with a defect.
std::string Device::replaced(std::string text) const {
  const std::string name = "/" + std::to_string(modules_.size()) + ".ptx";
  if (const char* folder = getenv("PTX_ON_CPU_DUMP")) std::ofstream(folder + name) << text;
  if (const char* folder = getenv("PTX_ON_CPU_MODULES")) {
    std::ifstream file(folder + name);
    if (file) return (std::ostringstream() << file.rdbuf()).str();
  }
  return text;
}

Module* Device::load(std::string text) {
  try {
    modules_.push_back(load_module(replaced(std::move(text))));
    return modules_.back().get();
  } catch (const Fault& f) {
    modules_.emplace_back();
    error = f.what();
    return nullptr;
  }
}

void Device::launch(Entry& entry, Dim grid, Dim block, uint32_t dynamic_shared, void* const* args) {
  std::vector<uint8_t> params(entry.param_bytes);
  for (size_t k = 0; k < entry.params.size(); ++k)
    memcpy(params.data() + entry.params[k].offset, args[k], entry.params[k].size);
  Schedule now = schedule;
  now.seed += uint32_t(launches_);
  ++launches_;
  now.scatter = schedule.scatter || (scatter_every && launches_ % scatter_every == 0);
  const Launch launch{entry, grid, block, dynamic_shared, params.data(), memory, now, traffic};
  try {
    run(launch);
  } catch (const Fault& f) {
    error = f.what();
    throw;
  }
}

// A line "entry name launches blocks" for each entry, then one for each of its instructions.
void Device::write_counts(const char* file) const {
  FILE* out = fopen(file, "w");
  if (!out) return;
  for (const auto& m : modules_) {
    if (!m) continue;
    for (const auto& [name, e] : m->entries) {
      fprintf(out, "entry %s %llu %llu\n", name.c_str(), (unsigned long long)e.launches, (unsigned long long)e.blocks);
      for (const Instruction& i : e.code) write_line(out, i);
    }
  }
  fclose(out);
}

void Device::clear_counts() {
  for (auto& m : modules_)
    if (m)
      for (auto& [name, e] : m->entries) {
        e.launches = e.blocks = 0;
        for (Instruction& i : e.code) i.count = {};
      }
}

}  // namespace ptx_on_cpu
