// For images of one or three channels, a thread computes all channels of a run of pixels. So both reading planes and
// writing pixels, or the reverse, move 16-byte words. Other channel counts, and float64, are computed in the order of
// the result; an input in another order is gathered.
#include "../model_entry.h"
#include "loop.cuh"

namespace ensadv {
namespace {

constexpr int kRun = 8;  // pixels or elements of a thread

template <class A>
__device__ __forceinline__ A load_one(const In& from, int64_t i) {
  A v = 0;
  with_one_of<float, half_t, bfloat_t, level_t, double>(from.dtype, [&](auto t) {
    v = A(to_compute(static_cast<const decltype(t)*>(from.data)[i]));
  });
  return v;
}

template <class A>
__device__ __forceinline__ A constant(const void* values, int64_t c) {
  return static_cast<const A*>(values)[c];
}

// A run of pixels of one sample from pixel p on. `whole`: it may move as 16-byte words.
struct Run {
  int64_t sample, p;
  int count;
  bool whole;
};

// Loads all words of a run before it uses the first.
template <int C>
__device__ __forceinline__ void load_run(const ModelEntryArgs& args, const Pixels& from, const Run& r,
                                         float (&v)[C][kRun]) {
  const int64_t first = r.sample * args.spatial * C;
  with_one_of<float, half_t, bfloat_t, level_t>(from.in.dtype, [&](auto t) {
    using T = decltype(t);
    if (from.channels_last && C > 1) {
      T pixels[C * kRun];
      load_raw<T, C * kRun>(from.in.data, first + r.p * C, r.count * C, r.whole, pixels);
#pragma unroll
      for (int j = 0; j < kRun; ++j)
#pragma unroll
        for (int c = 0; c < C; ++c) v[c][j] = to_compute(pixels[C * j + c]);
    } else {
      T planes[C][kRun];
#pragma unroll
      for (int c = 0; c < C; ++c)
        load_raw<T, kRun>(from.in.data, first + c * args.spatial + r.p, r.count, r.whole, planes[c]);
#pragma unroll
      for (int c = 0; c < C; ++c)
#pragma unroll
        for (int j = 0; j < kRun; ++j) v[c][j] = to_compute(planes[c][j]);
    }
  });
}

// Rounds a run to T and stores it. If all runs of a warp are whole, the warp's pixels are contiguous in memory. They
// then go through `stage` (this warp's shared memory, kWarpLanes * C * kRun elements) to leave as neighbouring 16-byte
// words.
template <class T, int C>
__device__ __forceinline__ void store_run(const ModelEntryArgs& args, const Run& r, bool whole_warp, uint4* stage,
                                          const float (&v)[C][kRun]) {
  const int64_t first = r.sample * args.spatial * C;
  T pixels[C * kRun];
  if (!(args.out_channels_last && C > 1)) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int j = 0; j < kRun; ++j) pixels[j] = round_to<T>(v[c][j]);
      store_pack<T, kRun>(args.out.data, first + c * args.spatial + r.p, r.count, r.whole, pixels);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kRun; ++j)
#pragma unroll
    for (int c = 0; c < C; ++c) pixels[C * j + c] = round_to<T>(v[c][j]);
  if (!whole_warp) {
    store_pack<T, C * kRun>(args.out.data, first + r.p * C, r.count * C, r.whole, pixels);
    return;
  }
  constexpr int kWords = C * kRun * int(sizeof(T)) / 16;
  const int lane = threadIdx.x % kWarpLanes;
  uint4 words[kWords];
  memcpy(words, pixels, sizeof(words));
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kWords; ++k) stage[lane * kWords + k] = words[k];
  __syncwarp();
  T* mine = static_cast<T*>(args.out.data) + first + r.p * C;
  uint4* dst = reinterpret_cast<uint4*>(mine) - lane * kWords;
#pragma unroll
  for (int k = 0; k < kWords; ++k) dst[k * kWarpLanes + lane] = stage[k * kWarpLanes + lane];
}

template <int C>
__device__ __forceinline__ void load_image(const ModelEntryArgs& args, const Run& r, float (&v)[C][kRun]) {
  load_run<C>(args, args.x, r, v);
  if (!args.delta.in.data) return;
  float delta[C][kRun];
  load_run<C>(args, args.delta, r, delta);
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int j = 0; j < kRun; ++j) v[c][j] = v[c][j] + delta[c][j];
}

__device__ __forceinline__ Run run_at(const ModelEntryArgs& args, int64_t i, const Batch& batch, bool aligned) {
  Run r;
  r.sample = sample_of(i, batch);
  r.p = (i - r.sample * batch.inner) * kRun;
  r.count = args.spatial - r.p < kRun ? int(args.spatial - r.p) : kRun;
  r.whole = aligned && r.count == kRun;
  return r;
}

// Both directions: out = f(x + delta), or the gradient through it.
template <int C, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2) runs_kernel(ModelEntryArgs args, ModelEntry<float> f, bool aligned) {
  constexpr int kStage = C > 1 ? kWarpLanes * C * kRun * int(sizeof(float)) / 16 : 1;
  __shared__ uint4 stage[kThreads / kWarpLanes][kStage];
  const int64_t per_sample = (args.spatial + kRun - 1) / kRun, runs = args.batch * per_sample;
  float mean[C], std[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    mean[c] = kBackward ? 0.0f : constant<float>(args.mean, c);
    std[c] = constant<float>(args.std, c);
  }
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  const int lane = threadIdx.x % kWarpLanes;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < runs; i += stride) {
    const Run r = run_at(args, i, {runs, per_sample}, aligned);
    const bool whole_warp = aligned && args.spatial % kRun == 0 && i - lane + kWarpLanes <= runs;
    float v[C][kRun], grad[C][kRun];
    const bool image = !kBackward || args.x.in.data;
    if (image) load_image<C>(args, r, v);
    if constexpr (kBackward) load_run<C>(args, args.grad, r, grad);
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if constexpr (kBackward)
          v[c][j] = (image ? f.passed(grad[c][j], v[c][j]) : grad[c][j]) / std[c];
        else
          v[c][j] = f.centered(v[c][j], mean[c]) / std[c];
      }
    with_one_of<float, half_t, bfloat_t>(args.out.dtype, [&](auto t) {
      store_run<decltype(t)>(args, r, whole_warp, stage[threadIdx.x / kWarpLanes], v);
    });
  }
}

// The position of a result's element, which steps along the result's memory: [sample, outer, inner]. outer and inner
// are channel and pixel, or the reverse.
struct Position {
  int64_t sample, outer, inner;

  __device__ __forceinline__ Position(const ModelEntryArgs& args, int64_t i) {
    const int64_t inners = args.out_channels_last ? args.channels : args.spatial, row = i / inners;
    const int64_t outers = args.out_channels_last ? args.spatial : args.channels;
    inner = i - row * inners;
    sample = row / outers;
    outer = row - sample * outers;
  }
  __device__ __forceinline__ void step(const ModelEntryArgs& args) {
    if (++inner < (args.out_channels_last ? args.channels : args.spatial)) return;
    inner = 0;
    if (++outer < (args.out_channels_last ? args.spatial : args.channels)) return;
    outer = 0;
    ++sample;
  }
  __device__ __forceinline__ int64_t channel(const ModelEntryArgs& args) const {
    return args.out_channels_last ? inner : outer;
  }
  __device__ __forceinline__ int64_t in(const ModelEntryArgs& args, bool channels_last) const {
    const int64_t pixel = args.out_channels_last ? outer : inner, c = channel(args);
    const int64_t first = sample * args.channels * args.spatial;
    return first + (channels_last ? pixel * args.channels + c : c * args.spatial + pixel);
  }
};

// The kRun elements of `from` that belong to elements i, i + 1, ... of the result.
template <class A>
__device__ __forceinline__ void load_elements(const ModelEntryArgs& args, const Pixels& from, int64_t i, int count,
                                              bool whole, A* dst) {
  if (from.channels_last == args.out_channels_last) {
    load_any<kRun, float, half_t, bfloat_t, level_t, double>(from.in, i, count, whole, dst);
    return;
  }
  Position at(args, i);
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    dst[j] = j < count ? load_one<A>(from.in, at.in(args, from.channels_last)) : A(0);
    at.step(args);
  }
}

template <class A, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2) elements_kernel(ModelEntryArgs args, ModelEntry<A> f, bool aligned) {
  for_each_pack<kRun>(args.batch * args.channels * args.spatial, aligned, [&](int64_t i, int count, bool whole) {
    A v[kRun], other[kRun];
    const bool image = !kBackward || args.x.in.data;
    if (image) {
      load_elements(args, args.x, i, count, whole, v);
      if (args.delta.in.data) {
        load_elements(args, args.delta, i, count, whole, other);
#pragma unroll
        for (int j = 0; j < kRun; ++j) v[j] = v[j] + other[j];
      }
    }
    if constexpr (kBackward) load_elements(args, args.grad, i, count, whole, other);
    Position at(args, i);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const int64_t c = j < count ? at.channel(args) : 0;
      const A std = constant<A>(args.std, c);
      if constexpr (kBackward)
        v[j] = (image ? f.passed(other[j], v[j]) : other[j]) / std;
      else
        v[j] = f.centered(v[j], constant<A>(args.mean, c)) / std;
      at.step(args);
    }
    with_one_of<float, half_t, bfloat_t, double>(args.out.dtype, [&](auto t) {
      using T = decltype(t);
      T out[kRun];
#pragma unroll
      for (int j = 0; j < kRun; ++j) out[j] = round_to<T>(v[j]);
      store_pack<T, kRun>(args.out.data, i, count, whole, out);
    });
  });
}

bool all_aligned(const ModelEntryArgs& args) {
  return is_aligned(args.x.in.data) && is_aligned(args.delta.in.data) && is_aligned(args.grad.in.data) &&
         is_aligned(args.out.data);
}

template <int C, bool kBackward>
int runs(const ModelEntryArgs& args, void* stream) {
  const bool aligned = args.spatial % kRun == 0 && all_aligned(args);
  const int64_t items = args.batch * ((args.spatial + kRun - 1) / kRun);
  const ModelEntry<float> f(args.clamp);
  return launch<1>(runs_kernel<C, kBackward>, items, stream, args, f, aligned);
}

template <class A, bool kBackward>
int elements(const ModelEntryArgs& args, void* stream) {
  const int64_t numel = args.batch * args.channels * args.spatial;
  const ModelEntry<A> f(args.clamp);
  return launch<kRun>(elements_kernel<A, kBackward>, numel, stream, args, f, all_aligned(args));
}

template <bool kBackward>
int dispatch(const ModelEntryArgs& args, void* stream) {
  if (args.in_double) return elements<double, kBackward>(args, stream);
  bool any_f64 = args.out.dtype == Dtype::f64;
  for (const Pixels* p : {&args.x, &args.delta, &args.grad}) any_f64 |= p->in.data && p->in.dtype == Dtype::f64;
  if (!any_f64 && args.channels == 3) return runs<3, kBackward>(args, stream);
  if (!any_f64 && args.channels == 1) return runs<1, kBackward>(args, stream);
  return elements<float, kBackward>(args, stream);
}

}  // namespace

int model_entry_cuda(const ModelEntryArgs& args, void* stream) { return dispatch<false>(args, stream); }
int model_entry_grad_cuda(const ModelEntryArgs& args, void* stream) { return dispatch<true>(args, stream); }

}  // namespace ensadv
