#include "../kernels/random_step.h"
#include "harness.h"

namespace ensadv::selftest {
namespace {

void check_random_step(Harness& harness, Dtype dtype, Dtype out_dtype, Noise noise, int64_t channels,
                       const Variant& v) {
  const char* kinds[] = {"rademacher ", "uniform ", "truncated_normal ", "normal "};
  const std::string layout = channels == 1 ? "contiguous" : "channels_last " + std::to_string(channels);
  const std::string name = std::string("random_step ") + kinds[int(noise)] + name_of(dtype) + " out " +
                           name_of(out_dtype) + " " + layout + ", " + v.name;
  const TwinPtr key = key_of(0x123456789abcdef, 0x7edcba9876543210);
  harness.over_shapes(name, [&](const Shape& s) {
    const int64_t spatial = std::max<int64_t>(1, s.inner / channels);
    const int64_t inner = spatial * channels, n = s.samples * inner;
    const TwinPtr x = random_values(dtype, n, -0.05, 1.05, v.misaligned_in, 1);
    const TwinPtr eps = v.eps_n ? random_sizes(dtype, s.samples, 5) : nullptr;
    const TwinPtr index = v.eps_n ? indices(s.samples) : nullptr;
    const TwinPtr fresh = v.fresh_out(n, out_dtype);
    Twin& out = fresh ? *fresh : *x;
    const auto arguments = [&](Side side) {
      return RandomStepArgs{in_of(x, dtype, side), out_of(out, out_dtype, side), ints_of(key, side),
                            ints_of(index, side), {data_of(eps, side), 8 / 255.}, noise, v.lo, v.hi, {n, inner},
                            {channels, spatial}};
    };
    random_step_cpu(arguments(Side::host), 0, n);
    harness.must_finish(random_step_cuda(arguments(Side::device), harness.stream()), "random_step");
    return out.difference(out_dtype);
  });
}

constexpr Variant kVariants[] = {
    {.name = "one eps"},
    {.name = "eps and index [N], in place", .eps_n = true, .in_place = true},
    {.name = "misaligned", .misaligned_in = true, .misaligned_out = true},
    {.name = "eps and index [N], no box", .eps_n = true, .lo = -kInf, .hi = kInf},
};

}  // namespace

void check_random_steps(Harness& harness) {
  for (Noise noise : {Noise::rademacher, Noise::uniform, Noise::truncated_normal, Noise::normal})
    for (int64_t channels : {1, 2, 3, 5})
      for (const Variant& v : kVariants) {
        for (Dtype d : kAll) check_random_step(harness, d, d, noise, channels, v);
        if (!v.in_place) check_random_step(harness, Dtype::u8, Dtype::f32, noise, channels, v);
      }
}

}  // namespace ensadv::selftest
