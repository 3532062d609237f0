// Buffers that exist on the CPU and on the GPU, filled alike and compared bit for bit (a NaN equals any NaN).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../kernels/cuda/launch.h"
#include "../kernels/numeric.h"

namespace ensadv::selftest {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// After a failed call the device cannot be used any more.
inline void must(int error, const char* what) {
  if (error == 0) return;
  printf("FAILED %s: %s\n", what, cuda_error_text(error));
  exit(1);
}
#define MUST(call) must(int(call), #call)

inline const char* name_of(Dtype d) {
  switch (d) {
    case Dtype::f32: return "float32";
    case Dtype::f16: return "float16";
    case Dtype::bf16: return "bfloat16";
    case Dtype::u8: return "uint8";
    default: return "float64";
  }
}

// `bytes` on either side, `lead` bytes past an aligned address. Allocations end with them, so that compute-sanitizer
// sees every access beyond.
class Twin {
 public:
  Twin(int64_t bytes, int64_t lead) : host_(size_t(lead + bytes), char(0xff)), lead_(lead) {
    MUST(cudaMalloc(&device_, host_.size()));
    upload();
  }
  ~Twin() { cudaFree(device_); }
  Twin(const Twin&) = delete;

  char* host() { return host_.data() + lead_; }
  char* device() { return static_cast<char*>(device_) + lead_; }
  void upload() {
    MUST(cudaMemcpy(device_, host_.data(), host_.size(), cudaMemcpyHostToDevice));
    MUST(cudaDeviceSynchronize());  // the launchers' stream does not wait for this one
  }
  std::vector<char> download() const {
    std::vector<char> result(host_.size());
    MUST(cudaMemcpy(result.data(), device_, result.size(), cudaMemcpyDeviceToHost));
    return result;
  }
  // Says where device memory differs from the host's, the bytes before the base included. Empty: nowhere.
  std::string difference(Dtype dtype) const {
    if (host_.empty()) return "";
    const std::vector<char> got = download();
    if (memcmp(got.data(), host_.data(), size_t(lead_))) return "wrote before its base";
    const int64_t size = size_of(dtype), n = (int64_t(got.size()) - lead_) / size;
    for (int64_t i = 0; i < n; ++i) {
      const char *a = got.data() + lead_ + i * size, *b = host_.data() + lead_ + i * size;
      if (memcmp(a, b, size_t(size)) && !(is_nan(a, dtype) && is_nan(b, dtype)))
        return "element " + std::to_string(i) + " of " + std::to_string(n) + ": CUDA " + show(a, dtype) + ", CPU " +
               show(b, dtype);
    }
    return "";
  }

 private:
  static double number(const char* p, Dtype dtype) {
    float f;
    double d;
    half_t h;
    bfloat_t b;
    switch (dtype) {
      case Dtype::u8: return uint8_t(*p);
      case Dtype::f32: memcpy(&f, p, 4); return f;
      case Dtype::f16: memcpy(&h, p, 2); return to_compute(h);
      case Dtype::bf16: memcpy(&b, p, 2); return to_compute(b);
      default: memcpy(&d, p, 8); return d;
    }
  }
  static bool is_nan(const char* p, Dtype dtype) { return std::isnan(number(p, dtype)); }
  static std::string show(const char* p, Dtype dtype) {
    char text[40];
    snprintf(text, sizeof text, "%.9g", number(p, dtype));
    return text;
  }

  std::vector<char> host_;
  int64_t lead_;
  void* device_ = nullptr;
};
using TwinPtr = std::unique_ptr<Twin>;

constexpr float kSpecials[] = {0.f,   -0.f,   1.f,      -1.f,    kNan,      kInf,      -kInf,    1e-40f, -1e-45f,
                               6e-8f, -3e-8f, 1.00001f, 65504.f, -65520.f,  3.4e38f,   -3.4e38f, 0.5f,   1e-30f};

template <class T>
T narrow(double v) {
  if constexpr (sizeof(T) == 1) {
    return {uint8_t(v > 0.0 ? v < 1.0 ? 255.0 * v + 0.5 : 255.0 : 0.0)};
  } else if constexpr (sizeof(T) == 2) {
    T t{};
    t.bits = uint16_t(round_bits(float(v), t));
    return t;
  } else {
    return T(v);
  }
}

// Random numbers in [lo, hi). Every seventh is a special one, or without `specials` a zero or a NaN.
inline TwinPtr random_values(Dtype dtype, int64_t n, double lo, double hi, bool misaligned, uint32_t seed,
                             bool specials = true) {
  auto twin = std::make_unique<Twin>(n * size_of(dtype), misaligned ? size_of(dtype) : 0);
  std::minstd_rand random(seed);
  const auto fill = [&](auto t) {
    using T = decltype(t);
    T* dst = reinterpret_cast<T*>(twin->host());
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t r = random();
      const double u = double(random()) / double(std::minstd_rand::max());
      const double special = specials ? kSpecials[r / 7 % std::size(kSpecials)] : r / 7 % 2 ? 0.0 : NAN;
      dst[i] = narrow<T>(r % 7 == 0 ? special : lo + (hi - lo) * u);
    }
  };
  switch (dtype) {
    case Dtype::f32: fill(float()); break;
    case Dtype::f16: fill(half_t()); break;
    case Dtype::bf16: fill(bfloat_t()); break;
    case Dtype::u8: fill(level_t()); break;
    default: fill(double()); break;
  }
  twin->upload();
  return twin;
}

// One size per sample, negative ones and NaN among them.
inline TwinPtr random_sizes(Dtype dtype, int64_t n, uint32_t seed) {
  return random_values(dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32, n, -0.1, 0.3, false, seed);
}

inline TwinPtr indices(int64_t n) {
  auto twin = std::make_unique<Twin>(n * 8, 0);
  for (int64_t i = 0; i < n; ++i) reinterpret_cast<int64_t*>(twin->host())[i] = 7919 * i + 0xfffffff0;
  twin->upload();
  return twin;
}

inline TwinPtr key_of(int64_t seed, int64_t offset) {
  auto twin = std::make_unique<Twin>(16, 0);
  reinterpret_cast<int64_t*>(twin->host())[0] = seed;
  reinterpret_cast<int64_t*>(twin->host())[1] = offset;
  twin->upload();
  return twin;
}

enum class Side { host, device };
constexpr Side kSides[] = {Side::host, Side::device};

inline char* data_of(Twin& t, Side side) { return side == Side::host ? t.host() : t.device(); }
inline char* data_of(const TwinPtr& t, Side side) { return t ? data_of(*t, side) : nullptr; }
template <class T>
T* data_as(Twin& t, Side side) {
  return reinterpret_cast<T*>(data_of(t, side));
}
template <class T>
T* data_as(const TwinPtr& t, Side side) {
  return reinterpret_cast<T*>(data_of(t, side));
}
inline In in_of(const TwinPtr& t, Dtype d, Side side) { return {data_of(t, side), d}; }
inline Out out_of(Twin& t, Dtype d, Side side) { return {data_of(t, side), d}; }
inline const int64_t* ints_of(const TwinPtr& t, Side side) { return data_as<const int64_t>(t, side); }

}  // namespace ensadv::selftest
