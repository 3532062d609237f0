// The device that programs see: its memory, the modules they brought along, and its errors.
//
// Environment:
//   PTX_ON_CPU_SEED=n      the first launch's seed (1); each further launch has the next one
//   PTX_ON_CPU_SCATTER=n   every n-th launch runs with scattered warps (8); 0: none
//   PTX_ON_CPU_TRAFFIC=1   count sectors and bank conflicts
//   PTX_ON_CPU_COUNTS=f    at exit, write to file f how often each instruction ran
//   PTX_ON_CPU_DUMP=d      write each module's text to d/0.ptx, d/1.ptx...
//   PTX_ON_CPU_MODULES=d   read it from there instead, where there is such a file
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "block.h"

namespace ptx_on_cpu {

class Device {
 public:
  static Device& get();

  Module* load(std::string text);  // null after a Fault, which error() then tells
  void launch(Entry& entry, Dim grid, Dim block, uint32_t dynamic_shared, void* const* args);

  GlobalMemory memory;
  std::string error;  // of the last launch or module that failed
  Schedule schedule;
  uint32_t scatter_every = 8;
  bool traffic = false;

  void write_counts(const char* file) const;
  void clear_counts();
  void forget() { modules_.clear(); }

 private:
  Device();
  ~Device();

  std::string replaced(std::string text) const;

  std::vector<std::unique_ptr<Module>> modules_;
  uint64_t launches_ = 0;
};

}  // namespace ptx_on_cpu
