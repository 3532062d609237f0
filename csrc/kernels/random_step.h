// random_step: clip(x + noise, lo, hi), where the noise is a function of (key, sample, element) alone.
//
// Elements are counted in logical (contiguous) order in every memory format. The maps from Philox words:
//   rademacher: element e takes bit e % 32 of word (e % 128) / 32 of block e / 128; 1 is +eps, 0 is -eps.
//   uniform:    element e takes word e % 4 of block e / 4, its upper 24 bits i: eps * (2 i + 1 - 2^24) / 2^24,
//               symmetric about 0, never 0, never beyond +-eps.
//   truncated_normal, normal: the same word through the inverse distribution function (quantile.h):
//               eps / 2 * z with |z| <= 2, and eps * z.
#pragma once

#include "numeric.h"
#include "philox.h"
#include "quantile.h"
#include "tensor_ref.h"

namespace ensadv {

enum class Noise : int32_t { rademacher, uniform, truncated_normal, normal };

// channels == 1: elements lie in logical order. Otherwise the format is channels_last: memory position p * channels + c
// of a sample holds logical element c * spatial + p.
struct Layout {
  int64_t channels = 1;
  int64_t spatial = 1;
};

struct RandomStepArgs {
  In x;
  Out out;  // x's dtype; for uint8 x also float32
  const int64_t* key = nullptr;
  const int64_t* index = nullptr;
  PerSample eps;
  Noise noise = Noise::rademacher;
  double lo = 0.0, hi = 1.0;  // -inf, inf: no clipping
  Batch batch;
  Layout layout;
};

// The CPU loop interleaves whole pixels in a buffer, which holds at least two pixels of this many channels.
constexpr int64_t kMaxChannelsLast = 2048;

// Elements per Philox block: a sign takes one of its 128 bits, every other kind of noise one of its four words.
template <bool kSigns>
constexpr int kPerBlock = kSigns ? 128 : 4;

ENSADV_HD float sign_noise(uint32_t word, int bit, float eps) {
  return bits_float(float_bits(eps) ^ 0x80000000u ^ ((word >> bit) << 31));
}

ENSADV_HD float word_noise(Noise noise, uint32_t word, float eps) {
  // The odd number that the upper 24 bits stand for, between -2^24 and 2^24: exact as a float.
  const float i = float(int32_t(word >> 8) * 2 + 1 - (1 << 24));
  if (noise == Noise::uniform) return eps * (i * 0x1p-24f);
  if (noise == Noise::normal) return eps * quantile(i * 0x1p-25f);
  const float z = quantile(i * (0x1p-25f * 0.954499736f));  // P(|z| < 2) = erf(sqrt 2)
  return eps * clamp(0.5f * z, -1.0f, 1.0f);
}

// How far from x a result may lie. Only normal noise has no bound.
ENSADV_HD float noise_reach(Noise noise, float eps) { return noise == Noise::normal ? INFINITY : eps; }

void random_step_cpu(const RandomStepArgs& args, int64_t begin, int64_t end);
int random_step_cuda(const RandomStepArgs& args, void* stream);

}  // namespace ensadv
