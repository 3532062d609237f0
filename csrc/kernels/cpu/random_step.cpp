#include "../random_step.h"

#include "loop.h"

namespace ensadv {
namespace {

constexpr int kBlocks = 64;         // Philox blocks drawn at a time
constexpr int kTile = 4096;         // noise values made at a time
constexpr int kSlack = 128;         // values before a tile's first, at most: a block has 128
static_assert(kTile >= 2 * kMaxChannelsLast);

ENSADV_CLONES void draw_blocks(const Key& key, uint32_t first, uint32_t sample, int n, uint32_t* words) {
  uint32_t w[4][kBlocks];
  ENSADV_INDEPENDENT for (int b = 0; b < kBlocks; ++b) {  // always all: a fixed count vectorises
    const Words block = draw(key, first + uint32_t(b), sample);
    w[0][b] = block.w[0];
    w[1][b] = block.w[1];
    w[2][b] = block.w[2];
    w[3][b] = block.w[3];
  }
  for (int b = 0; b < n; ++b)
    for (int k = 0; k < 4; ++k) words[4 * b + k] = w[k][b];
}

ENSADV_CLONES void expand_rademacher(const uint32_t* words, int n, float eps, float* dst) {
  for (int k = 0; k < n; ++k)
    for (int j = 0; j < 32; ++j) dst[32 * k + j] = sign_noise(words[k], j, eps);
}

#define ENSADV_EXPAND(kind)                                                               \
  ENSADV_CLONES void expand_##kind(const uint32_t* words, int n, float eps, float* dst) { \
    for (int k = 0; k < n; ++k) dst[k] = word_noise(Noise::kind, words[k], eps);          \
  }
ENSADV_EXPAND(uniform)
ENSADV_EXPAND(truncated_normal)
ENSADV_EXPAND(normal)
#undef ENSADV_EXPAND

using Expand = void (*)(const uint32_t*, int, float, float*);
constexpr Expand kExpand[] = {expand_rademacher, expand_uniform, expand_truncated_normal, expand_normal};

// Writes the noise of logical elements [e, e + n) of one sample to `dst` (kTile + 2 * kSlack values) and returns where
// in dst it begins.
const float* fill(Noise noise, const Key& key, uint32_t sample, int64_t e, int n, float eps, float* dst) {
  const int per = noise == Noise::rademacher ? kPerBlock<true> : kPerBlock<false>;
  const int64_t first = e / per;
  const int blocks = int((e + n - 1) / per - first) + 1;
  uint32_t words[4 * kBlocks];
  for (int b = 0; b < blocks; b += kBlocks) {
    const int count = std::min(kBlocks, blocks - b);
    draw_blocks(key, uint32_t(first + b), sample, count, words);
    kExpand[int(noise)](words, 4 * count, eps, dst + int64_t(b) * per);
  }
  return dst + (e - first * per);
}

ENSADV_CLONES void interleave3(const float* a, const float* b, const float* c, int pixels, float* dst) {
  for (int p = 0; p < pixels; ++p) {
    dst[3 * p] = a[p];
    dst[3 * p + 1] = b[p];
    dst[3 * p + 2] = c[p];
  }
}

#define ENSADV_ADD_NOISE(A)                                                                      \
  ENSADV_CLONES void add_noise(const A* x, const float* noise, A* v, int n, Box<A> box) {        \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) v[i] = finish(x[i] + noise[i], x[i], 0, box); \
  }
ENSADV_ADD_NOISE(float)
ENSADV_ADD_NOISE(double)
#undef ENSADV_ADD_NOISE

struct Scratch {
  float plane[3][kTile + 2 * kSlack];
  float pixels[kTile];
};

// The noise of memory positions [m, m + n) of a sample, for n <= kTile.
const float* tile_noise(const RandomStepArgs& args, const Key& key, int64_t sample, int64_t m, int n, float eps,
                        Scratch& s) {
  const uint32_t id = sample_id(args.index, sample);
  const auto [channels, spatial] = args.layout;
  if (channels == 1) return fill(args.noise, key, id, m, n, eps, s.plane[0]);
  const int64_t p0 = m / channels;
  const int pixels = int((m + n - 1) / channels - p0) + 1;
  if (channels == 3) {
    const float* plane[3];
    for (int c = 0; c < 3; ++c)
      plane[c] = fill(args.noise, key, id, c * spatial + p0, pixels, eps, s.plane[c]);
    interleave3(plane[0], plane[1], plane[2], pixels, s.pixels);
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      const float* plane = fill(args.noise, key, id, c * spatial + p0, pixels, eps, s.plane[0]);
      for (int p = 0; p < pixels; ++p) s.pixels[p * channels + c] = plane[p];
    }
  }
  return s.pixels + (m - p0 * channels);
}

}  // namespace

void random_step_cpu(const RandomStepArgs& args, int64_t begin, int64_t end) {
  const Key key = read_key(args.key);
  const int64_t channels = args.layout.channels;
  // Tiles of whole pixels, less one: a tile that starts inside a pixel touches one pixel more.
  const int tile = channels == 1 ? kTile : int(std::max<int64_t>(1, kTile / channels - 1) * channels);
  Scratch scratch;
  with_dtype(args.out.dtype, [&](auto t) {
    using T = decltype(t);
    using A = compute_t<T>;
    const Box<T> box = make_box<T>(args.lo, args.hi);
    A xs[kStrip], vs[kStrip];
    const auto body = [&](int64_t i, int n, int64_t sample) {
      const float eps = float(size_at<A>(args.eps, sample));
      const float* noise = tile_noise(args, key, sample, i - sample * args.batch.inner, n, eps, scratch);
      for (int k = 0; k < n; k += kStrip) {
        const int count = std::min(kStrip, n - k);
        const A* x = load(args.x, i + k, count, xs);
        T* out = static_cast<T*>(args.out.data) + i + k;
        A* v = computed_in(out, vs);
        add_noise(x, noise + k, v, count, computed_box(box));
        if constexpr (kStored<T>) store(v, x, noise_reach(args.noise, eps), box, out, count);
      }
    };
    for_each_strip(args.batch, true, tile, begin, end, body);
  });
}

}  // namespace ensadv
