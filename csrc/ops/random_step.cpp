#include "../kernels/random_step.h"

#include "common.h"

namespace ensadv::ops {
namespace {

void random_step(const Tensor x, const Tensor key, const std::optional<Tensor> index,
                 const std::optional<Tensor> eps_n, double eps, int64_t kind, double lo, double hi,
                 const Tensor out) {
  constexpr const char* op = "random_step";
  check_like(op, "out", out, x);
  check_overlap(op, "x", out, x);
  const Format format = common_format(op, {&x, &out});
  STD_TORCH_CHECK(kind >= 0 && kind <= int64_t(Noise::normal), op, ": unknown kind of noise");
  RandomStepArgs args{in_ref(op, x), out_ref(op, out), int64_data(op, "key", key, 2, x),
                      index_data(op, index, x.dim() ? x.size(0) : 1, x), per_sample(op, "eps", eps_n, eps, x, true),
                      Noise(kind), lo, hi, batch_of(x), {}};
  STD_TORCH_CHECK(args.x.dtype == args.out.dtype || (args.x.dtype == Dtype::u8 && args.out.dtype == Dtype::f32), op,
                  ": out must have x's dtype, or be float32 for uint8 x");
  if (args.batch.numel == 0) return;
  if (format == Format::channels_last) {
    args.layout = {x.size(1), args.batch.inner / x.size(1)};
    STD_TORCH_CHECK(args.layout.channels <= kMaxChannelsLast, op, ": at most ", kMaxChannelsLast,
                    " channels in channels_last format");
  }
  if (x.is_cuda()) {
    on_cuda(op, x, [&](void* stream) { return random_step_cuda(args, stream); });
  } else {
    on_cpu(args.batch.numel, [&](int64_t begin, int64_t end) { random_step_cpu(args, begin, end); });
  }
}

ENSADV_OP(random_step,
          "(Tensor x, Tensor key, Tensor? index, Tensor? eps_n, float eps, int kind, float lo, float hi, "
          "Tensor(a!) out) -> ()")

}  // namespace
}  // namespace ensadv::ops
