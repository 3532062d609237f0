#include "../kernels/model_entry.h"
#include "harness.h"

namespace ensadv::selftest {
namespace {

struct Sizes {
  int64_t batch, channels, spatial;
};
constexpr Sizes kSizes[] = {{2, 1, 784}, {3, 3, 7},    {1, 3, 8},  {2, 3, 143},
                            {33, 3, 64}, {5, 3, 1024}, {2, 5, 64}, {3, 2, 11}};

// What is given and asked for, by the bits of a number.
struct Mode {
  bool in_last, delta_last, out_last, delta, clamp, backward;

  explicit Mode(int bits)
      : in_last(bits & 1), delta_last(bits & 2), out_last(bits & 4), delta(bits & 8), clamp(bits & 16),
        backward(bits & 32) {}
};
constexpr int kModes = 64;

std::string difference(Harness& harness, Dtype x_dtype, Dtype out_dtype, bool misaligned, const Sizes& s,
                       const Mode& mode) {
  const bool in_double = x_dtype == Dtype::f64;
  const int64_t n = s.batch * s.channels * s.spatial;
  const Dtype delta_dtype = in_double ? Dtype::f64 : Dtype::bf16, grad_dtype = in_double ? Dtype::f64 : Dtype::f16;
  const Dtype compute = in_double ? Dtype::f64 : Dtype::f32;
  const TwinPtr x = random_values(x_dtype, n, -0.2, 1.2, misaligned, 1);
  const TwinPtr delta = random_values(delta_dtype, n, -0.3, 0.3, misaligned, 2);
  const TwinPtr grad = random_values(grad_dtype, n, -1, 1, misaligned, 3);
  const TwinPtr mean = random_values(compute, s.channels, 0.3, 0.6, false, 4, false);
  const TwinPtr std = random_values(compute, s.channels, 0.2, 0.4, false, 5, false);
  Twin out(n * size_of(out_dtype), misaligned ? size_of(out_dtype) : 0);
  const auto arguments = [&](Side side) {
    const bool image = !mode.backward || mode.clamp;
    ModelEntryArgs a;
    a.x = {image ? in_of(x, x_dtype, side) : In{}, mode.backward ? mode.out_last : mode.in_last};
    a.delta = {image && mode.delta ? in_of(delta, delta_dtype, side) : In{}, mode.delta_last};
    a.grad = {mode.backward ? in_of(grad, grad_dtype, side) : In{}, mode.in_last};
    a.out = out_of(out, out_dtype, side);
    a.out_channels_last = mode.out_last;
    a.in_double = in_double;
    a.mean = data_of(mean, side);
    a.std = data_of(std, side);
    a.clamp = mode.clamp;
    a.batch = s.batch;
    a.channels = s.channels;
    a.spatial = s.spatial;
    return a;
  };
  (mode.backward ? model_entry_grad_cpu : model_entry_cpu)(arguments(Side::host), 0, s.batch * s.spatial);
  const auto cuda = mode.backward ? model_entry_grad_cuda : model_entry_cuda;
  harness.must_finish(cuda(arguments(Side::device), harness.stream()), "model_entry");
  return out.difference(out_dtype);
}

void check_model_entry(Harness& harness, Dtype x_dtype, Dtype out_dtype, bool misaligned) {
  std::string problem;
  for (const Sizes& s : kSizes)
    for (int bits = 0; bits < kModes && problem.empty(); ++bits) {
      problem = difference(harness, x_dtype, out_dtype, misaligned, s, Mode(bits));
      if (!problem.empty())
        problem = "channels " + std::to_string(s.channels) + ", spatial " + std::to_string(s.spatial) + ", mode " +
                  std::to_string(bits) + " " + problem;
    }
  const std::string name = std::string("model_entry ") + name_of(x_dtype) + " to " + name_of(out_dtype);
  harness.note(name + (misaligned ? " misaligned" : ""), problem);
}

}  // namespace

void check_model_entries(Harness& harness) {
  for (Dtype x : kAll)
    for (Dtype out : kFloats)
      for (bool misaligned : {false, true}) check_model_entry(harness, x, out, misaligned);
}

}  // namespace ensadv::selftest
