// What the cases are drawn with: random choices, and buffers on both sides.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../kernels/cuda/launch.h"
#include "../kernels/numeric.h"
#include "../kernels/tensor_ref.h"

namespace ensadv {

inline void must(int error, const char* what) {
  if (error == 0) return;
  printf("FAILED %s: %s\n", what, cuda_error_text(error));
  exit(1);
}

class Draw {
 public:
  explicit Draw(uint32_t seed) : random_(seed) {}

  int64_t below(int64_t n) { return int64_t(random_() % uint64_t(n)); }
  int64_t between(int64_t lo, int64_t hi) { return lo + below(hi - lo + 1); }
  bool once_in(int n) { return below(n) == 0; }
  double unit() { return double(random_() >> 11) * 0x1p-53; }
  template <class T>
  T one_of(std::initializer_list<T> all) {
    return all.begin()[below(int64_t(all.size()))];
  }

  // Mostly small, with whole packs and their neighbours, and now and then several chunks.
  int64_t size() {
    if (once_in(40)) return between(16000, 40000);
    if (once_in(4)) return 8 * between(1, 300) + between(-1, 1);
    return once_in(3) ? between(1, 3000) : between(1, 70);
  }

 private:
  std::mt19937_64 random_;
};

// The same bytes on the host and the device, `lead` bytes past an aligned address, allocated to the byte.
class Buffer {
 public:
  Buffer(int64_t bytes, int64_t lead) : host_(size_t(bytes + lead), char(0xff)), lead_(lead) {
    must(int(cudaMalloc(&device_, host_.size())), "cudaMalloc");
  }
  ~Buffer() { cudaFree(device_); }
  Buffer(const Buffer&) = delete;

  char* on(bool host) { return host ? host_.data() + lead_ : static_cast<char*>(device_) + lead_; }
  void upload() {
    if (host_.empty()) return;
    must(int(cudaMemcpy(device_, host_.data(), host_.size(), cudaMemcpyHostToDevice)), "cudaMemcpy");
    must(int(cudaDeviceSynchronize()), "cudaMemcpy");
  }
  std::vector<char> download() const {
    std::vector<char> all(host_.size());
    if (!all.empty()) must(int(cudaMemcpy(all.data(), device_, all.size(), cudaMemcpyDeviceToHost)), "cudaMemcpy");
    return {all.begin() + long(lead_), all.end()};
  }
  // Where the sides differ, a NaN being any NaN; empty: nowhere.
  std::string difference(Dtype dtype);

 private:
  std::vector<char> host_;
  int64_t lead_;
  void* device_ = nullptr;
};
using BufferPtr = std::unique_ptr<Buffer>;

inline double number(const char* p, Dtype dtype) {
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

inline void put(char* p, Dtype dtype, double v) {
  const float f = float(v);
  const half_t h = round_to<half_t>(f);
  const bfloat_t b = round_to<bfloat_t>(f);
  const uint8_t level = uint8_t(v > 0 ? v < 1 ? 255 * v + 0.5 : 255 : 0);
  switch (dtype) {
    case Dtype::u8: memcpy(p, &level, 1); return;
    case Dtype::f32: memcpy(p, &f, 4); return;
    case Dtype::f16: memcpy(p, &h, 2); return;
    case Dtype::bf16: memcpy(p, &b, 2); return;
    default: memcpy(p, &v, 8); return;
  }
}

inline std::string Buffer::difference(Dtype dtype) {
  const std::vector<char> got = download();
  const char* want = on(true);
  const size_t size = size_t(size_of(dtype));
  for (size_t i = 0; i + size <= got.size(); i += size) {
    const double a = number(got.data() + i, dtype), b = number(want + i, dtype);
    if (!memcmp(got.data() + i, want + i, size) || (a != a && b != b)) continue;
    return "element " + std::to_string(i / size) + ": CUDA " + std::to_string(a) + ", CPU " + std::to_string(b);
  }
  return "";
}

// Numbers in [lo, hi), some of them special in some buffers.
inline BufferPtr numbers(Draw& draw, Dtype dtype, int64_t n, double lo, double hi, bool may_be_special = true) {
  constexpr double kSpecials[] = {0.0,   -0.0, 1.0,     NAN,      INFINITY, -INFINITY,
                                  1e-40, 6e-8, 65504.0, -65520.0, 3.4e38,   0.5};
  const int64_t size = size_of(dtype);
  auto buffer = std::make_unique<Buffer>(n * size, draw.once_in(3) ? size * draw.between(0, 16 / size) : 0);
  const int special = may_be_special && draw.once_in(2) ? int(draw.one_of({3, 30, 1000})) : 0;
  const double grid = draw.once_in(3) ? 255.0 : 0.0;  // images have ties
  for (int64_t i = 0; i < n; ++i) {
    double v = lo + (hi - lo) * draw.unit();
    if (grid > 0) v = std::round(v * grid) / grid;
    if (special && draw.once_in(special)) v = kSpecials[draw.below(int64_t(std::size(kSpecials)))];
    put(buffer->on(true) + i * size, dtype, v);
  }
  buffer->upload();
  return buffer;
}

inline BufferPtr integers64(Draw& draw, int64_t n, int64_t lo, int64_t hi) {
  auto buffer = std::make_unique<Buffer>(n * 8, 0);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t v = draw.between(lo, hi);
    memcpy(buffer->on(true) + 8 * i, &v, 8);
  }
  buffer->upload();
  return buffer;
}

inline BufferPtr random_bytes(Draw& draw, int64_t n) {
  auto buffer = std::make_unique<Buffer>(n, 0);
  for (int64_t i = 0; i < n; ++i) buffer->on(true)[i] = char(draw.below(256));
  buffer->upload();
  return buffer;
}

constexpr Dtype kFloats[] = {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64};

inline void launched(int error, const char* what) {
  must(error, what);
  must(int(cudaDeviceSynchronize()), what);
}

inline Dtype any_float(Draw& draw) { return kFloats[draw.below(4)]; }
inline Dtype any_dtype(Draw& draw) { return draw.once_in(5) ? Dtype::u8 : any_float(draw); }
inline Dtype wide_of(Dtype t) { return t == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
inline char* at(const BufferPtr& b, bool host) { return b ? b->on(host) : nullptr; }
inline const int64_t* ints(const BufferPtr& b, bool host) { return reinterpret_cast<const int64_t*>(at(b, host)); }
inline BufferPtr room(Draw& draw, int64_t n, Dtype t) {
  auto buffer = std::make_unique<Buffer>(n * size_of(t), draw.once_in(4) ? size_of(t) * draw.below(16) : 0);
  buffer->upload();
  return buffer;
}
inline BufferPtr a_key(Draw& draw) { return integers64(draw, 2, INT64_MIN / 2, INT64_MAX / 2); }

// A call drawn at random: what is wrong with it, or "".
std::string null_op(Draw& draw);
std::string sign_step(Draw& draw);
std::string momentum_step(Draw& draw);
std::string l2_step(Draw& draw);
std::string random_step(Draw& draw);
std::string keys(Draw& draw);
std::string bias_act(Draw& draw);
std::string model_entry(Draw& draw);
std::string logit_grad(Draw& draw);
std::string ensemble_linear(Draw& draw);
std::string ensemble_linear_act(Draw& draw);

}  // namespace ensadv
