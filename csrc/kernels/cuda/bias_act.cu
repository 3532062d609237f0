#include "../bias_act.h"
#include "loop.cuh"

namespace ensadv {
namespace {

constexpr int V = kMaskBits;  // elements of a thread: those of one byte of the mask

// The biases of V elements from i on; the last may lie beyond the end.
template <class A>
__device__ __forceinline__ void load_bias(const BiasActArgs& args, int64_t i, bool aligned, A (&dst)[V]) {
  const A* bias = static_cast<const A*>(args.bias);
  if (!bias) {
#pragma unroll
    for (int j = 0; j < V; ++j) dst[j] = kNoBias<A>;
    return;
  }
  const Batch rows{args.numel, args.channel_stride}, cycles{args.numel, args.channels};
  const int64_t row = args.channel_stride == 1 ? i : sample_of(i, rows);
  int64_t c = row - sample_of(row, cycles) * args.channels;
  int64_t ahead = (row + 1) * args.channel_stride - i;  // elements of this channel from i on
  if (ahead >= V) {
    const A one = bias[c];
#pragma unroll
    for (int j = 0; j < V; ++j) dst[j] = one;
  } else if (aligned && args.channel_stride == 1 && args.channels % V == 0) {
    load_raw<A, V>(bias, c, V, true, dst);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      dst[j] = bias[c];
      if (--ahead == 0) {
        ahead = args.channel_stride;
        c = c + 1 == args.channels ? 0 : c + 1;
      }
    }
  }
}

template <class T, bool kResidual>
__global__ void __launch_bounds__(kThreads, 2)
    bias_act_kernel(BiasActArgs args, BiasAct<compute_t<T>> f, bool aligned) {
  using A = compute_t<T>;
  for_each_pack<V>(args.numel, aligned, [&](int64_t i, int count, bool whole) {
    A x[V], residual[V], bias[V];
    load_pack<T, V>(args.x.data, i, count, whole, x);
    if constexpr (kResidual) load_pack<T, V>(args.residual.data, i, count, whole, residual);
    load_bias(args, i, aligned, bias);
    T out[V];
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      A v = x[j] + bias[j];
      if constexpr (kResidual) v = v + residual[j];
      out[j] = round_to<T>(f(v));
      bits |= uint32_t(f.passes(to_compute(out[j])) && j < count) << j;
    }
    store_pack<T, V>(args.out.data, i, count, whole, out);
    if (args.mask) args.mask[i / V] = uint8_t(bits);
  });
}

template <class T>
int run(const BiasActArgs& args, void* stream) {
  const bool aligned = is_aligned(args.x.data) && is_aligned(args.residual.data) && is_aligned(args.bias) &&
                       is_aligned(args.out.data);
  const auto kernel = args.residual.data ? bias_act_kernel<T, true> : bias_act_kernel<T, false>;
  return launch<V>(kernel, args.numel, stream, args, BiasAct<compute_t<T>>::of(args, T()), aligned);
}

}  // namespace

int bias_act_cuda(const BiasActArgs& args, void* stream) {
  switch (args.x.dtype) {
    case Dtype::f32: return run<float>(args, stream);
    case Dtype::f16: return run<half_t>(args, stream);
    case Dtype::bf16: return run<bfloat_t>(args, stream);
    case Dtype::f64: return run<double>(args, stream);
    default: return int(cudaErrorInvalidValue);
  }
}

}  // namespace ensadv
