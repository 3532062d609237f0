#include "../random_step.h"
#include "loop.cuh"

namespace ensadv {
namespace {

// Philox blocks are drawn where they are used: a pack of eight elements needs one or two, about ten integer
// instructions an element, which hide behind the memory traffic. In channels-last order neighbours come from
// different blocks, one per channel: kSlots of them are remembered.
template <class TX, class TO, bool kSigns, int kSlots>
__global__ void __launch_bounds__(kThreads) random_step_kernel(RandomStepArgs args, Box<TO> box, bool aligned) {
  using A = compute_t<TO>;
  constexpr int kPer = kPerBlock<kSigns>;
  constexpr int V = kPack<TX, TO>;
  const Key key = read_key(args.key);
  const int64_t channels = args.layout.channels, spatial = args.layout.spatial;
  for_each_pack<V>(args.batch.numel, aligned, [&](int64_t i, int count, bool whole) {
    A x[V];
    load_pack<TX, V>(args.x.data, i, count, whole, x);
    int64_t sample = sample_of(i, args.batch);
    int64_t m = i - sample * args.batch.inner;  // position in the sample's memory
    int64_t pixel = 0, channel = 0;
    if (channels > 1) {
      pixel = m / channels;
      channel = m - pixel * channels;
    }
    uint32_t id = sample_id(args.index, sample);
    float eps = float(size_at<A>(args.eps, sample));
    Words words[kSlots];
    int64_t held[kSlots];
#pragma unroll
    for (int s = 0; s < kSlots; ++s) held[s] = -1;
    TO out[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (m == args.batch.inner && j < count) {  // the pack runs on into the next sample
        m = pixel = channel = 0;
        ++sample;
        id = sample_id(args.index, sample);
        eps = float(size_at<A>(args.eps, sample));
#pragma unroll
        for (int s = 0; s < kSlots; ++s) held[s] = -1;
      }
      const int64_t e = channels > 1 ? channel * spatial + pixel : m;
      const int64_t block = e / kPer;
      const int slot = j % kSlots;
      if (held[slot] != block) {
        held[slot] = block;
        words[slot] = draw(key, uint32_t(block), id);
      }
      const int lane = int(e % kPer);
      // Select the word without indexing registers by a run-time number, which would spill them.
      const int w = kSigns ? lane >> 5 : lane;
      const uint32_t word = w == 0   ? words[slot].w[0]
                            : w == 1 ? words[slot].w[1]
                            : w == 2 ? words[slot].w[2]
                                     : words[slot].w[3];
      const float noise = kSigns ? sign_noise(word, lane & 31, eps) : word_noise(args.noise, word, eps);
      out[j] = finish(x[j] + noise, x[j], noise_reach(args.noise, eps), box);
      ++m;
      if (channels > 1 && ++channel == channels) {
        channel = 0;
        ++pixel;
      }
    }
    store_pack<TO, V>(args.out.data, i, count, whole, out);
  });
}

template <class TX, class TO, bool kSigns, int kSlots>
int run(const RandomStepArgs& args, void* stream) {
  const bool aligned = is_aligned(args.x.data) && is_aligned(args.out.data);
  return launch<kPack<TX, TO>>(random_step_kernel<TX, TO, kSigns, kSlots>, args.batch.numel, stream, args,
                               make_box<TO>(args.lo, args.hi), aligned);
}

template <class TX, class TO>
int with_noise(const RandomStepArgs& args, void* stream) {
  const bool rgb = args.layout.channels == 3;
  if (args.noise == Noise::rademacher)
    return rgb ? run<TX, TO, true, 3>(args, stream) : run<TX, TO, true, 1>(args, stream);
  return rgb ? run<TX, TO, false, 3>(args, stream) : run<TX, TO, false, 1>(args, stream);
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
