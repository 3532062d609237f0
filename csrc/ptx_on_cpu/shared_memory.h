// A block's shared memory. Of every word it knows which bytes were ever written, who wrote and read it last, and which
// bytes an asynchronous copy is still to bring.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptx_on_cpu {

// Who: a thread, at this many block barriers and synchronisations of its warp. Two accesses of different threads are
// in order if a barrier lies between them, or if the threads are of one warp and a bar.warp.sync does.
struct Access {
  int thread;
  uint32_t epoch, warp_epoch;
};

class SharedMemory {
 public:
  explicit SharedMemory(uint32_t bytes) : data_(bytes), words_((bytes + 3) / 4) {}

  uint32_t size() const { return uint32_t(data_.size()); }
  // Both return what is wrong with the access, or an empty string. The range lies within the memory.
  std::string read(uint32_t at, uint32_t bytes, const Access& by, void* out);
  std::string write(uint32_t at, uint32_t bytes, const Access& by, const void* data);
  std::string copy_begins(uint32_t at, uint32_t bytes, const Access& by);
  void copy_ends(uint32_t at, uint32_t bytes, const Access& by, const void* data);

 private:
  struct Mark {
    Access last{-1, 0, 0};
    uint8_t bytes = 0;                  // of the word
    bool lanes = false, warps = false;  // so did other lanes of the warp, or other warps
  };
  struct Word {
    Mark written, read;
    uint8_t initialised = 0, awaited = 0;
  };

  template <class Body>
  std::string over_words(uint32_t at, uint32_t bytes, Body body);
  static bool races(const Mark& mark, uint8_t bytes, const Access& by);
  static void note(Mark* mark, uint8_t bytes, const Access& by);
  static std::string race(const char* what, const Mark& mark);

  std::vector<uint8_t> data_;
  std::vector<Word> words_;
};

}  // namespace ptx_on_cpu
