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
  check_choice(op, "kind", kind, int64_t(Noise::normal));
  RandomStepArgs args{in_ref(op, "x", x), out_ref(op, "out", out), int64_data(op, "key", key, 2, x),
                      index_data(op, index, x.dim() ? x.size(0) : 1, x), per_sample(op, "eps", eps_n, eps, x, true),
                      Noise(kind), lo, hi, batch_of(x), {}};
  if (args.x.dtype != Dtype::u8 || args.out.dtype != Dtype::f32) check_dtype(op, "out", out, x.scalar_type());
  if (args.batch.numel == 0) return;
  if (format == Format::channels_last) {
    args.layout = {x.size(1), args.batch.inner / x.size(1)};
    ENSADV_CHECK(args.layout.channels <= kMaxChannelsLast, op, "x must have at most ", kMaxChannelsLast,
                 " channels in channels_last format, got ", args.layout.channels);
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
