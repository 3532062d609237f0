#include "../kernels/ensemble_linear.h"
#include "harness.h"

namespace ensadv::selftest {
namespace {

constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::f16, Dtype::bf16};

// Small integers: their sums are exact in float32, and so the same in any order.
TwinPtr integers(Dtype dtype, int64_t n, bool misaligned, uint32_t seed) {
  auto twin = std::make_unique<Twin>(n * size_of(dtype), misaligned ? size_of(dtype) : 0);
  std::minstd_rand random(seed);
  for (int64_t i = 0; i < n; ++i) {
    const double v = double(random() / 16 % 7) - 3.0;
    switch (dtype) {
      case Dtype::f32: data_as<float>(*twin, Side::host)[i] = float(v); break;
      case Dtype::f16: data_as<half_t>(*twin, Side::host)[i] = narrow<half_t>(v); break;
      default: data_as<bfloat_t>(*twin, Side::host)[i] = narrow<bfloat_t>(v); break;
    }
  }
  twin->upload();
  return twin;
}
TwinPtr random_bytes(int64_t n, uint32_t seed) {
  auto twin = std::make_unique<Twin>(n, 0);
  std::minstd_rand random(seed);
  for (int64_t i = 0; i < n; ++i) twin->host()[i] = char(random() / 16);
  twin->upload();
  return twin;
}

struct Product {
  int64_t members;
  int32_t batch, cols, inner;
};
// Less than a tile, and rows that allow copies of 16, 8, 4 and 2 bytes; several tiles, whole and cut; as many as large
// tiles are used for; no inner elements.
constexpr Product kProducts[] = {{1, 1, 1, 1},       {2, 3, 10, 7},       {3, 65, 66, 130},    {2, 64, 64, 64},
                                 {2, 70, 300, 300},  {3, 130, 129, 1001}, {2, 256, 1000, 784}, {8, 256, 2048, 300},
                                 {4, 600, 2047, 33}, {2, 5, 20, 0}};

// Which product, by the bits of a number: the backward one; then forward shared, bias, act, or backward keep, reduce.
struct Mode {
  bool backward, shared, bias, act, keep, reduce;

  explicit Mode(int bits)
      : backward(bits & 1), shared(!backward && bits & 2), bias(!backward && bits & 4), act(!backward && bits & 8),
        keep(backward && bits & 2), reduce(backward && bits & 4) {}
};

std::string difference(Harness& harness, Dtype dtype, const Product& s, const Mode& mode, bool misaligned) {
  const int64_t rows = s.members * s.batch, out_rows = mode.reduce ? s.batch : rows;
  const TwinPtr a = integers(dtype, (mode.shared ? s.batch : rows) * s.inner, misaligned, 1);
  const TwinPtr b = integers(dtype, s.members * s.cols * s.inner, misaligned, 2);
  const TwinPtr bias = integers(dtype, s.members * s.cols, misaligned, 3);
  const TwinPtr keep = random_bytes(rows * mask_bytes(s.inner), 4);
  Twin out(out_rows * s.cols * size_of(dtype), misaligned ? size_of(dtype) : 0), mask(out_rows * mask_bytes(s.cols), 0);
  const auto arguments = [&](Side side) {
    LinearArgs args;
    args.a = in_of(a, dtype, side);
    args.b = in_of(b, dtype, side);
    if (mode.bias) args.bias = in_of(bias, dtype, side);
    args.out = out_of(out, dtype, side);
    if (mode.act) args.mask = data_as<uint8_t>(mask, side);
    if (mode.keep) args.keep = data_as<uint8_t>(keep, side);
    args.members = s.members;
    args.batch = s.batch;
    args.cols = s.cols;
    args.inner = s.inner;
    args.shared = mode.shared;
    args.inner_first = mode.backward;
    args.reduce = mode.reduce;
    return args;
  };
  const LinearArgs host = arguments(Side::host);
  ensemble_linear_cpu(host, 0, linear_blocks(host));
  harness.must_finish(ensemble_linear_cuda(arguments(Side::device), harness.stream()), "ensemble_linear");
  const std::string problem = out.difference(dtype);
  return problem.empty() && mode.act ? mask.difference(Dtype::u8) : problem;
}

void check_products(Harness& harness, Dtype dtype, int bits) {
  std::string problem;
  for (const Product& s : kProducts)
    for (bool misaligned : {false, true}) {
      if (!problem.empty()) break;
      problem = difference(harness, dtype, s, Mode(bits), misaligned);
      if (!problem.empty())
        problem = std::to_string(s.members) + " x " + std::to_string(s.batch) + " x " + std::to_string(s.cols) + " x " +
                  std::to_string(s.inner) + (misaligned ? " misaligned: " : ": ") + problem;
    }
  harness.note(std::string("ensemble_linear ") + name_of(dtype) + ", mode " + std::to_string(bits), problem);
}

// Bits: misaligned, bias, mask, keep.
std::string act_difference(Harness& harness, Dtype dtype, int bits, int32_t cols) {
  constexpr int64_t members = 2, rows = 6;
  const bool misaligned = bits & 1;
  const TwinPtr a = random_values(dtype, rows * cols, -1, 1, misaligned, 1);
  const TwinPtr bias = random_values(dtype, members * cols, -1, 1, misaligned, 2);
  const TwinPtr out = random_values(dtype, rows * cols, -1, 1, misaligned, 3);
  const TwinPtr keep = random_bytes(rows * mask_bytes(cols), 4);
  Twin mask(rows * mask_bytes(cols), 0);
  const auto arguments = [&](Side side) {
    LinearActArgs args;
    args.out = out_of(*out, dtype, side);
    args.rows = rows;
    args.batch = rows / members;
    args.cols = cols;
    if (bits & 2) args.bias = in_of(bias, dtype, side);
    if (bits & 4) args.mask = data_as<uint8_t>(mask, side);
    if (bits & 8) {
      args.a = in_of(a, dtype, side);
      args.keep = data_as<uint8_t>(keep, side);
    }
    return args;
  };
  ensemble_linear_act_cpu(arguments(Side::host), 0, rows);
  harness.must_finish(ensemble_linear_act_cuda(arguments(Side::device), harness.stream()), "ensemble_linear_act");
  const std::string problem = out->difference(dtype);
  return problem.empty() && bits & 4 ? mask.difference(Dtype::u8) : problem;
}

void check_act(Harness& harness, Dtype dtype) {
  std::string problem;
  for (int bits = 0; bits < 10; ++bits)  // from 8 on with `keep`, which allows neither bias nor mask
    for (int32_t cols : {1, 8, 20, 300, 1000, 1001})
      if (problem.empty()) problem = act_difference(harness, dtype, bits, cols);
  harness.note(std::string("ensemble_linear_act ") + name_of(dtype), problem);
}

}  // namespace

void check_ensemble_linears(Harness& harness) {
  for (Dtype dtype : kDtypes) {
    for (int bits = 0; bits < 16; ++bits)
      if (!(bits & 1 && bits & 8)) check_products(harness, dtype, bits);
    check_act(harness, dtype);
  }
}

}  // namespace ensadv::selftest
