#include "../kernels/sample_eps.h"

#include "common.h"

namespace ensadv::ops {
namespace {

void sample_eps(const Tensor key, const std::optional<Tensor> index, int64_t dist, double eps_max, double sigma,
                const Tensor out) {
  constexpr const char* op = "sample_eps";
  ENSADV_CHECK(out.dim() == 1 && out.is_contiguous() && out.scalar_type() == ScalarType::Float, op,
               "out must be contiguous float32 [n], got ", described(out));
  check_choice(op, "dist", dist, int64_t(EpsDist::truncated_normal));
  const int64_t n = out.size(0);
  SampleEpsArgs args{static_cast<float*>(out.data_ptr()), n, int64_data(op, "key", key, 2, out),
                     index_data(op, index, n, out), EpsDist(dist), eps_max, sigma,
                     std::erf(eps_max / (sigma * std::sqrt(2.0)))};
  if (n == 0) return;
  if (out.is_cuda()) {
    on_cuda(op, out, [&](void* stream) { return sample_eps_cuda(args, stream); });
  } else {
    sample_eps_cpu(args);
  }
}

ENSADV_OP(sample_eps, "(Tensor key, Tensor? index, int dist, float eps_max, float sigma, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace ensadv::ops
