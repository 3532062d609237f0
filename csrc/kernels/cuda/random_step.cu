#include "../random_step.h"
#include "loop.cuh"

namespace ensadv {
namespace {

// Philox blocks are drawn where they are used: a pack of eight elements needs one or two, about ten integer
// instructions an element, which hide behind the memory traffic. In channels-last order neighbours come from
// different blocks, one per channel: kSlots of them are remembered.
template <class T, Noise kNoise, int kSlots>
__global__ void __launch_bounds__(kThreads) random_step_kernel(RandomStepArgs args, Box<T> box, bool aligned) {
  using A = compute_t<T>;
  using Map = NoiseMap<kNoise>;
  constexpr int V = kPack<T>;
  const Key key = read_key(args.key);
  const int64_t channels = args.layout.channels, spatial = args.layout.spatial;
  for_each_pack<V>(args.batch.numel, aligned, [&](int64_t i, int count, bool whole) {
    A x[V];
    load_pack<T, V>(args.x.data, i, count, whole, x);
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
    T out[V];
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
      const int64_t block = e / Map::kPerBlock;
      constexpr int kSlotCount = kSlots;
      const int slot = j % kSlotCount;
      if (held[slot] != block) {
        held[slot] = block;
        words[slot] = draw(key, uint32_t(block), id);
      }
      const int lane = int(e % Map::kPerBlock);
      // Select the word without indexing registers by a run-time number, which would spill them.
      const int w = kNoise == Noise::rademacher ? lane >> 5 : lane;
      const uint32_t word = w == 0   ? words[slot].w[0]
                            : w == 1 ? words[slot].w[1]
                            : w == 2 ? words[slot].w[2]
                                     : words[slot].w[3];
      out[j] = finish(x[j] + Map::value(word, lane & 31, eps), x[j], A(eps), box);
      ++m;
      if (channels > 1 && ++channel == channels) {
        channel = 0;
        ++pixel;
      }
    }
    store_pack<T, V>(args.out.data, i, count, whole, out);
  });
}

template <class T, Noise kNoise, int kSlots>
int run(const RandomStepArgs& args, void* stream) {
  unsigned grid = 0;
  const cudaError_t error = grid_for(args.batch.numel, kPack<T>, &grid);
  if (error != cudaSuccess) return int(error);
  const bool aligned = is_aligned(args.x.data) && is_aligned(args.out.data);
  random_step_kernel<T, kNoise, kSlots><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      args, make_box<T>(args.lo, args.hi), aligned);
  return int(cudaGetLastError());
}

template <class T>
int with_noise(const RandomStepArgs& args, void* stream) {
  const bool rgb = args.layout.channels == 3;
  switch (args.noise) {
    case Noise::rademacher:
      return rgb ? run<T, Noise::rademacher, 3>(args, stream) : run<T, Noise::rademacher, 1>(args, stream);
    case Noise::uniform:
      return rgb ? run<T, Noise::uniform, 3>(args, stream) : run<T, Noise::uniform, 1>(args, stream);
  }
  return int(cudaErrorInvalidValue);
}

}  // namespace

int random_step_cuda(const RandomStepArgs& args, void* stream) {
  if (args.x.dtype != args.out.dtype) return int(cudaErrorInvalidValue);
  switch (args.out.dtype) {
    case Dtype::f32: return with_noise<float>(args, stream);
    case Dtype::f64: return with_noise<double>(args, stream);
    case Dtype::f16: return with_noise<half_t>(args, stream);
    case Dtype::bf16: return with_noise<bfloat_t>(args, stream);
  }
  return int(cudaErrorInvalidValue);
}

}  // namespace ensadv
