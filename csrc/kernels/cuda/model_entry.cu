// Images of one or three channels: a thread computes all channels of a run of pixels, so that reading planes and
// writing pixels, or the reverse, both move 16-byte words. Other channel counts, and float64, go in the order of
// the result, where an input in another order is gathered.
#include "../model_entry.h"
#include "loop.cuh"

namespace ensadv {
namespace {

constexpr int kRun = 8;  // pixels, or elements, of a thread
constexpr int kWarp = 32;

// V elements of `from`, neighbours in memory, from the i-th on. kAny: float64 may be among them.
template <int V, bool kAny, class A>
__device__ __forceinline__ void load_any(const In& from, int64_t i, int count, bool whole, A* dst) {
  const auto as = [&](auto t) {
    using T = decltype(t);
    compute_t<T> values[V];
    load_pack<T, V>(from.data, i, count, whole, values);
#pragma unroll
    for (int j = 0; j < V; ++j) dst[j] = A(values[j]);
  };
  switch (from.dtype) {
    case Dtype::f32: return as(float());
    case Dtype::f16: return as(half_t());
    case Dtype::bf16: return as(bfloat_t());
    case Dtype::u8: {
      // Eight bytes are half a word of load_pack's.
      const uint8_t* src = static_cast<const uint8_t*>(from.data) + i;
      level_t values[V];
      if (whole) {
        uint2 words[V / 8];
#pragma unroll
        for (int k = 0; k < V / 8; ++k) words[k] = reinterpret_cast<const uint2*>(src)[k];
        memcpy(values, words, sizeof(values));
      } else {
#pragma unroll
        for (int j = 0; j < V; ++j) values[j].level = j < count ? src[j] : uint8_t(0);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) dst[j] = A(to_compute(values[j]));
      return;
    }
    default:
      if constexpr (kAny) as(double());
  }
}

template <class A>
__device__ __forceinline__ A load_one(const In& from, int64_t i) {
  const auto as = [&](auto t) { return A(to_compute(static_cast<const decltype(t)*>(from.data)[i])); };
  switch (from.dtype) {
    case Dtype::f32: return as(float());
    case Dtype::f16: return as(half_t());
    case Dtype::bf16: return as(bfloat_t());
    case Dtype::u8: return as(level_t());
    default: return as(double());
  }
}

// The other way; rounded.
template <int V, class A>
__device__ __forceinline__ void store_any(const Out& to, int64_t i, int count, bool whole, const A* v) {
  const auto as = [&](auto t) {
    using T = decltype(t);
    T values[V];
#pragma unroll
    for (int j = 0; j < V; ++j) values[j] = round_to<T>(v[j]);
    store_pack<T, V>(to.data, i, count, whole, values);
  };
  switch (to.dtype) {
    case Dtype::f32: return as(float());
    case Dtype::f16: return as(half_t());
    case Dtype::bf16: return as(bfloat_t());
    default: return as(double());
  }
}

template <class A>
__device__ __forceinline__ A constant(const void* values, int64_t c) {
  return static_cast<const A*>(values)[c];
}

// A run of pixels of one sample: where it starts, and whether it moves as whole 16-byte words.
struct Run {
  int64_t sample, p;
  int count;
  bool whole;
};

template <int C>
__device__ __forceinline__ void load_run(const ModelEntryArgs& args, const Pixels& from, const Run& r,
                                         float (&v)[C][kRun]) {
  const int64_t first = r.sample * args.spatial * C;
  if (from.last && C > 1) {
    float pixels[C * kRun];
    load_any<C * kRun, false>(from.in, first + r.p * C, r.count * C, r.whole, pixels);
#pragma unroll
    for (int j = 0; j < kRun; ++j)
#pragma unroll
      for (int c = 0; c < C; ++c) v[c][j] = pixels[C * j + c];
  } else {
#pragma unroll
    for (int c = 0; c < C; ++c)
      load_any<kRun, false>(from.in, first + c * args.spatial + r.p, r.count, r.whole, v[c]);
  }
}

// `stage` is this warp's, kWarp * C * kRun elements: through it the warp's pixels, contiguous in memory where all
// of its runs are whole, leave as neighbouring 16-byte words.
template <class T, int C>
__device__ __forceinline__ void store_run(const ModelEntryArgs& args, const Run& r, bool whole_warp, uint4* stage,
                                          const T (&v)[C][kRun]) {
  const int64_t first = r.sample * args.spatial * C;
  if (!(args.out_last && C > 1)) {
#pragma unroll
    for (int c = 0; c < C; ++c)
      store_pack<T, kRun>(args.out.data, first + c * args.spatial + r.p, r.count, r.whole, v[c]);
    return;
  }
  T pixels[C * kRun];
#pragma unroll
  for (int j = 0; j < kRun; ++j)
#pragma unroll
    for (int c = 0; c < C; ++c) pixels[C * j + c] = v[c][j];
  if (!whole_warp) {
    store_pack<T, C * kRun>(args.out.data, first + r.p * C, r.count * C, r.whole, pixels);
    return;
  }
  constexpr int kWords = C * kRun * int(sizeof(T)) / 16;
  const int lane = threadIdx.x % kWarp;
  uint4 words[kWords];
  memcpy(words, pixels, sizeof(words));
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kWords; ++k) stage[lane * kWords + k] = words[k];
  __syncwarp();
  T* mine = static_cast<T*>(args.out.data) + first + r.p * C;
  uint4* dst = reinterpret_cast<uint4*>(mine) - lane * kWords;
#pragma unroll
  for (int k = 0; k < kWords; ++k) dst[k * kWarp + lane] = stage[k * kWarp + lane];
}

// Both directions: out = f(x + delta), or the gradient through it.
template <class T, int C, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2) runs_kernel(ModelEntryArgs args, ModelEntry<float> f, bool aligned) {
  constexpr int kStage = C > 1 ? kWarp * C * kRun * int(sizeof(T)) / 16 : 1;
  __shared__ uint4 stage[kThreads / kWarp][kStage];
  const int64_t per_sample = (args.spatial + kRun - 1) / kRun, runs = args.batch * per_sample;
  const Batch batch{runs, per_sample};
  float mean[C], std[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    mean[c] = kBackward ? 0.0f : constant<float>(args.mean, c);
    std[c] = constant<float>(args.std, c);
  }
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  const int lane = threadIdx.x % kWarp;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < runs; i += stride) {
    Run r;
    r.sample = sample_of(i, batch);
    r.p = (i - r.sample * per_sample) * kRun;
    r.count = args.spatial - r.p < kRun ? int(args.spatial - r.p) : kRun;
    r.whole = aligned && r.count == kRun;
    const bool whole_warp = aligned && args.spatial % kRun == 0 && i - lane + kWarp <= runs;
    float v[C][kRun], other[C][kRun];
    const bool image = !kBackward || args.x.in.data;
    if (image) {
      load_run<C>(args, args.x, r, v);
      if (args.delta.in.data) {
        load_run<C>(args, args.delta, r, other);
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
          for (int j = 0; j < kRun; ++j) v[c][j] = v[c][j] + other[c][j];
      }
    }
    if constexpr (kBackward) load_run<C>(args, args.grad, r, other);
    T out[C][kRun];
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if constexpr (kBackward)
          out[c][j] = round_to<T>((image ? f.passed(other[c][j], v[c][j]) : other[c][j]) / std[c]);
        else
          out[c][j] = round_to<T>(f.centered(v[c][j], mean[c]) / std[c]);
      }
    store_run<T, C>(args, r, whole_warp, stage[threadIdx.x / kWarp], out);
  }
}

// Where an element of a result lies, stepped along the result's memory: [sample, outer, inner], which are channels
// and pixels, or the reverse.
struct Position {
  int64_t sample, outer, inner;

  __device__ __forceinline__ Position(const ModelEntryArgs& args, int64_t i) {
    const int64_t inners = args.out_last ? args.channels : args.spatial, row = i / inners;
    const int64_t outers = args.out_last ? args.spatial : args.channels;
    inner = i - row * inners;
    sample = row / outers;
    outer = row - sample * outers;
  }
  __device__ __forceinline__ void step(const ModelEntryArgs& args) {
    if (++inner < (args.out_last ? args.channels : args.spatial)) return;
    inner = 0;
    if (++outer < (args.out_last ? args.spatial : args.channels)) return;
    outer = 0;
    ++sample;
  }
  __device__ __forceinline__ int64_t channel(const ModelEntryArgs& args) const {
    return args.out_last ? inner : outer;
  }
  __device__ __forceinline__ int64_t in(const ModelEntryArgs& args, bool last) const {
    const int64_t pixel = args.out_last ? outer : inner, c = channel(args);
    return sample * args.channels * args.spatial + (last ? pixel * args.channels + c : c * args.spatial + pixel);
  }
};

// kRun elements of `from` where the result has its i-th and following.
template <class A>
__device__ __forceinline__ void load_elements(const ModelEntryArgs& args, const Pixels& from, int64_t i, int count,
                                              bool whole, A* dst) {
  if (from.last == args.out_last) return load_any<kRun, true>(from.in, i, count, whole, dst);
  Position at(args, i);
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    dst[j] = j < count ? load_one<A>(from.in, at.in(args, from.last)) : A(0);
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
    store_any<kRun>(args.out, i, count, whole, v);
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
  switch (args.out.dtype) {
    case Dtype::f32: return launch<1>(runs_kernel<float, C, kBackward>, items, stream, args, f, aligned);
    case Dtype::f16: return launch<1>(runs_kernel<half_t, C, kBackward>, items, stream, args, f, aligned);
    case Dtype::bf16: return launch<1>(runs_kernel<bfloat_t, C, kBackward>, items, stream, args, f, aligned);
    default: return int(cudaErrorInvalidValue);
  }
}

template <class A, bool kBackward>
int elements(const ModelEntryArgs& args, void* stream) {
  const int64_t numel = args.batch * args.channels * args.spatial;
  const ModelEntry<A> f(args.clamp);
  return launch<kRun>(elements_kernel<A, kBackward>, numel, stream, args, f, all_aligned(args));
}

template <bool kBackward>
int dispatch(const ModelEntryArgs& args, void* stream) {
  if (args.wide) return elements<double, kBackward>(args, stream);
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
