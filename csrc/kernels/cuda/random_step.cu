#include "../random_step.h"
#include "loop.cuh"

namespace ensadv {
namespace {

// The Philox block of each element of a pack, and the element's lane in it. The pack starts at element `start` of the
// sample; its elements from `from` on belong to this sample.
template <int kPer, int V>
__device__ __forceinline__ void locate(const Layout& layout, int64_t start, int from, uint32_t (&blocks)[V],
                                       int (&lanes)[V]) {
  const int64_t channels = layout.channels, spatial = layout.spatial;
  int64_t pixel = 0, channel = 0;
  if (channels > 1) {
    pixel = (start + from) / channels;
    channel = start + from - pixel * channels;
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int64_t e = channels > 1 ? channel * spatial + pixel : start + j;
    blocks[j] = uint32_t(e / kPer);
    lanes[j] = int(e % kPer);
    if (channels > 1 && j >= from && ++channel == channels) {
      channel = 0;
      ++pixel;
    }
  }
}

// The words of elements [from, to) of a pack. Philox blocks are drawn where they are used: a pack of eight elements
// needs one or two, about ten integer instructions an element, which the memory traffic hides. In channels_last order
// neighbours come from different blocks, one per channel. So a block is drawn for the first element that still waits
// for its word, and serves all elements of the pack that are in the block, in whatever order.
template <bool kSigns, int V>
__device__ __forceinline__ void draw_words(const Key& key, uint32_t id, bool channels_last, int64_t start, int from,
                                           int to, const uint32_t (&blocks)[V], const int (&lanes)[V],
                                           uint32_t (&words)[V]) {
  for (uint32_t waiting = (1u << to) - (1u << from); waiting;) {
    uint32_t block = uint32_t((start + __ffs(int(waiting)) - 1) / kPerBlock<kSigns>);
    if (channels_last) {
#pragma unroll
      for (int j = V - 1; j >= 0; --j) block = waiting >> j & 1 ? blocks[j] : block;
    }
    const Words drawn = draw(key, block, id);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (blocks[j] != block) continue;
      // Indexing registers by a run-time number would spill them.
      const int w = kSigns ? lanes[j] >> 5 : lanes[j];
      words[j] = w == 0 ? drawn.w[0] : w == 1 ? drawn.w[1] : w == 2 ? drawn.w[2] : drawn.w[3];
      waiting &= ~(1u << j);
    }
  }
}

template <class TX, class TO, bool kSigns>
__global__ void __launch_bounds__(kThreads) random_step_kernel(RandomStepArgs args, Box<TO> box, bool aligned) {
  using A = compute_t<TO>;
  constexpr int V = kPack<TX, TO>;
  const Key key = read_key(args.key);
  for_each_pack<V>(args.batch.numel, aligned, [&](int64_t i, int count, bool whole) {
    A x[V];
    load_pack<TX, V>(args.x.data, i, count, whole, x);
    TO out[V];
    int64_t sample = sample_of(i, args.batch);
    for (int from = 0; from < count; ++sample) {  // a pack seldom runs on into the next sample
      const int64_t start = i - sample * args.batch.inner;  // the pack's start in the sample; negative in later samples
      const int64_t ahead = args.batch.inner - start;
      const int to = ahead < count ? int(ahead) : count;
      uint32_t blocks[V], words[V];
      int lanes[V];
      locate<kPerBlock<kSigns>>(args.layout, start, from, blocks, lanes);
      const uint32_t id = sample_id(args.index, sample);
      draw_words<kSigns>(key, id, args.layout.channels > 1, start, from, to, blocks, lanes, words);
      const float eps = float(size_at<A>(args.eps, sample));
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (j < from || j >= to) continue;
        const float noise = kSigns ? sign_noise(words[j], lanes[j] & 31, eps) : word_noise(args.noise, words[j], eps);
        out[j] = finish(x[j] + noise, x[j], noise_reach(args.noise, eps), box);
      }
      from = to;
    }
    store_pack<TO, V>(args.out.data, i, count, whole, out);
  });
}

template <class TX, class TO, bool kSigns>
int run(const RandomStepArgs& args, void* stream) {
  const bool aligned = is_aligned(args.x.data) && is_aligned(args.out.data);
  return launch<kPack<TX, TO>>(random_step_kernel<TX, TO, kSigns>, args.batch.numel, stream, args,
                               make_box<TO>(args.lo, args.hi), aligned);
}

template <class TX, class TO>
int with_noise(const RandomStepArgs& args, void* stream) {
  return args.noise == Noise::rademacher ? run<TX, TO, true>(args, stream) : run<TX, TO, false>(args, stream);
}

}  // namespace

int random_step_cuda(const RandomStepArgs& args, void* stream) {
  const Dtype x = args.x.dtype, out = args.out.dtype;
  if (x == Dtype::f32 && out == x) return with_noise<float, float>(args, stream);
  if (x == Dtype::f64 && out == x) return with_noise<double, double>(args, stream);
  if (x == Dtype::f16 && out == x) return with_noise<half_t, half_t>(args, stream);
  if (x == Dtype::bf16 && out == x) return with_noise<bfloat_t, bfloat_t>(args, stream);
  if (x == Dtype::u8 && out == x) return with_noise<level_t, level_t>(args, stream);
  if (x == Dtype::u8 && out == Dtype::f32) return with_noise<level_t, float>(args, stream);
  return int(cudaErrorInvalidValue);
}

}  // namespace ensadv
