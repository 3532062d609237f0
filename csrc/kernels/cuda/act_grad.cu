#include "../act_grad.h"
#include "loop.cuh"

namespace ensadv {
namespace {

constexpr int V = kMaskBits;  // elements of a thread: those of one byte of the mask

template <class T>
__global__ void __launch_bounds__(kThreads) act_grad_kernel(ActGradArgs args, bool aligned) {
  for_each_pack<V>(args.numel, aligned, [&](int64_t i, int count, bool whole) {
    T values[V];
    load_raw<T, V>(args.grad.data, i, count, whole, values);
    const uint32_t bits = args.mask[i / V];
#pragma unroll
    for (int j = 0; j < V; ++j) values[j] = bits >> j & 1 ? values[j] : T{};
    store_pack<T, V>(args.out.data, i, count, whole, values);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) sloping_grad_kernel(ActGradArgs args, bool aligned) {
  using A = compute_t<T>;
  for_each_pack<V>(args.numel, aligned, [&](int64_t i, int count, bool whole) {
    A values[V];
    load_pack<T, V>(args.grad.data, i, count, whole, values);
    const uint32_t bits = args.mask[i / V];
    T out[V];
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = round_to<T>(bits >> j & 1 ? values[j] : values[j] * A(args.slope));
    store_pack<T, V>(args.out.data, i, count, whole, out);
  });
}

template <class T>
int run_sloping(const ActGradArgs& args, void* stream) {
  const bool aligned = is_aligned(args.grad.data) && is_aligned(args.out.data);
  return launch<V>(sloping_grad_kernel<T>, args.numel, stream, args, aligned);
}

template <class T>
int run(const ActGradArgs& args, void* stream) {
  const bool aligned = is_aligned(args.grad.data) && is_aligned(args.out.data);
  return launch<V>(act_grad_kernel<T>, args.numel, stream, args, aligned);
}

}  // namespace

int act_grad_cuda(const ActGradArgs& args, void* stream) {
  if (args.sloping) {
    switch (args.grad.dtype) {
      case Dtype::f32: return run_sloping<float>(args, stream);
      case Dtype::f16: return run_sloping<half_t>(args, stream);
      case Dtype::bf16: return run_sloping<bfloat_t>(args, stream);
      case Dtype::f64: return run_sloping<double>(args, stream);
      default: return int(cudaErrorInvalidValue);
    }
  }
  switch (size_of(args.grad.dtype)) {
    case 2: return run<half_t>(args, stream);
    case 4: return run<float>(args, stream);
    default: return run<double>(args, stream);
  }
}

}  // namespace ensadv
