// The device's conversion instructions against the host's arithmetic, Philox, and the normal quantile.
#include "../kernels/philox.h"
#include "../kernels/sample_eps.h"
#include "harness.h"

namespace ensadv::selftest {
namespace {

template <class T>
__global__ void widen_kernel(float* out) {
  T t{};
  t.bits = uint16_t(blockIdx.x * blockDim.x + threadIdx.x);
  out[t.bits] = to_compute(t);
}
template <class T>
__global__ void round_kernel(const float* v, uint16_t* out, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = uint16_t(round_bits(v[i], T{}));
}
__global__ void philox_kernel(uint32_t* out, uint32_t word) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  const Words w = philox(i, word, ~i, word, word ^ i, word);
  for (int k = 0; k < 4; ++k) out[4 * i + k] = w.w[k];
}
__global__ void quantile_kernel(double* out, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = normal_quantile((i + 0.5) / n);
}

// Every number of 16 bits and the points where rounding decides: halfway to the next number, and that point's
// neighbours.
template <class T>
std::vector<float> rounding_points() {
  std::vector<float> values;
  for (uint32_t p = 0; p < 65536; ++p) {
    const T x{uint16_t(p)}, next{uint16_t(p + 1)};
    const float v = to_compute(x), middle = float(0.5 * (double(v) + double(to_compute(next))));
    for (float f : {v, middle, std::nextafter(middle, kInf), std::nextafter(middle, -kInf)}) values.push_back(f);
  }
  for (uint32_t i = 0; i < (1u << 22); ++i) values.push_back(bits_float(i * 1021u));
  return values;
}

template <class T>
void check_conversions(Harness& harness) {
  const Dtype dtype = Traits<T>::dtype;
  Twin wide(65536 * 4, 0);
  for (uint32_t p = 0; p < 65536; ++p) data_as<float>(wide, Side::host)[p] = to_compute(T{uint16_t(p)});
  widen_kernel<T><<<256, 256, 0, harness.stream()>>>(data_as<float>(wide, Side::device));
  harness.must_finish(int(cudaGetLastError()), "widen");
  harness.note(std::string(name_of(dtype)) + " to float32", wide.difference(Dtype::f32));

  const std::vector<float> values = rounding_points<T>();
  const int n = int(values.size());
  Twin in(int64_t(n) * 4, 0), out(int64_t(n) * 2, 0);
  memcpy(in.host(), values.data(), values.size() * 4);
  in.upload();
  for (int i = 0; i < n; ++i) data_as<uint16_t>(out, Side::host)[i] = uint16_t(round_bits(values[size_t(i)], T{}));
  round_kernel<T><<<(n + 255) / 256, 256, 0, harness.stream()>>>(data_as<const float>(in, Side::device),
                                                                 data_as<uint16_t>(out, Side::device), n);
  harness.must_finish(int(cudaGetLastError()), "round");
  harness.note(std::string("float32 to ") + name_of(dtype), out.difference(dtype));
}

void check_philox(Harness& harness) {
  constexpr int n = 65536;
  Twin out(n * 16, 0);
  constexpr uint32_t kWord = 0xdeadbeefu;
  for (uint32_t i = 0; i < n; ++i) {
    const Words w = philox(i, kWord, ~i, kWord, kWord ^ i, kWord);
    memcpy(out.host() + 16 * i, w.w, 16);
  }
  philox_kernel<<<n / 256, 256, 0, harness.stream()>>>(reinterpret_cast<uint32_t*>(out.device()), kWord);
  harness.must_finish(int(cudaGetLastError()), "philox");
  const std::vector<char> got = out.download();
  harness.note("philox", memcmp(got.data(), out.host(), got.size()) ? "words differ" : "");
}

void check_quantile(Harness& harness) {
  constexpr int n = 1 << 20;
  Twin out(n * 8, 0);
  quantile_kernel<<<(n + 255) / 256, 256, 0, harness.stream()>>>(reinterpret_cast<double*>(out.device()), n);
  harness.must_finish(int(cudaGetLastError()), "normal_quantile");
  const std::vector<char> got = out.download();
  double worst = 0.0;
  for (int i = 0; i < n; ++i) {
    double a;
    memcpy(&a, got.data() + 8 * i, 8);
    const double b = normal_quantile((i + 0.5) / n);
    worst = std::max(worst, std::abs(a - b) / std::abs(b));
  }
  char text[64];
  snprintf(text, sizeof text, "relative difference %.2g", worst);
  harness.note("normal_quantile", worst < 1e-15 ? "" : text);
}

}  // namespace

void check_numbers(Harness& harness) {
  check_conversions<half_t>(harness);
  check_conversions<bfloat_t>(harness);
  check_philox(harness);
  check_quantile(harness);
}

}  // namespace ensadv::selftest
