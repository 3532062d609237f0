// random_step: clip(x + noise, lo, hi), the noise a function of (key, sample, element) alone.
//
// Elements are counted in logical (contiguous) order whatever the memory format. The maps from Philox words:
//   rademacher: element e takes bit e % 32 of word (e % 128) / 32 of block e / 128; 1 is +eps, 0 is -eps.
//   uniform:    element e takes word e % 4 of block e / 4, its upper 24 bits i: eps * (2 i + 1 - 2^24) / 2^24,
//               symmetric about 0, never 0 and never beyond +-eps.
#pragma once

#include "numeric.h"
#include "philox.h"
#include "tensor_ref.h"

namespace ensadv {

enum class Noise : int32_t { rademacher, uniform };

// channels == 1: elements lie in logical order. Otherwise channels-last: memory position p * channels + c of a
// sample holds logical element c * spatial + p.
struct Layout {
  int64_t channels = 1;
  int64_t spatial = 1;
};

struct RandomStepArgs {
  In x;
  Out out;  // same dtype as x
  const int64_t* key = nullptr;
  const int64_t* index = nullptr;
  PerSample eps;
  Noise noise = Noise::rademacher;
  double lo = 0.0, hi = 1.0;  // -inf, inf: no clipping
  Batch batch;
  Layout layout;
};

// The CPU loop interleaves whole pixels in a scratch buffer that holds at least two of this many channels.
constexpr int64_t kMaxChannelsLast = 2048;

template <Noise kNoise>
struct NoiseMap;

template <>
struct NoiseMap<Noise::rademacher> {
  static constexpr int kPerBlock = 128;
  static ENSADV_HD float value(uint32_t word, int bit, float eps) {
    return bits_float(float_bits(eps) ^ 0x80000000u ^ ((word >> bit) << 31));
  }
};

template <>
struct NoiseMap<Noise::uniform> {
  static constexpr int kPerBlock = 4;
  static ENSADV_HD float value(uint32_t word, int, float eps) {
    return eps * (float(int32_t(word >> 8) * 2 + 1 - (1 << 24)) * 0x1p-24f);
  }
};

void random_step_cpu(const RandomStepArgs& args, int64_t begin, int64_t end);
int random_step_cuda(const RandomStepArgs& args, void* stream);

}  // namespace ensadv
