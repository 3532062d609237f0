// Descriptions of memory, which launchers take in place of tensors.
#pragma once

#include <cstdint>

#include "platform.h"

namespace ensadv {

enum class Dtype : int32_t { f32, f16, bf16, f64, u8 };

constexpr int64_t size_of(Dtype d) {
  return d == Dtype::f64 ? 8 : d == Dtype::f32 ? 4 : d == Dtype::u8 ? 1 : 2;
}

struct In {
  const void* data = nullptr;  // null: this optional input is absent
  Dtype dtype = Dtype::f32;
};

struct Out {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
};

// One number for the whole batch, or one per sample. `data` holds the compute type A: float, or double for f64.
struct PerSample {
  const void* data = nullptr;
  double value = 0.0;
};

template <class A>
ENSADV_HD A value_at(const PerSample& p, int64_t sample) {
  return p.data ? static_cast<const A*>(p.data)[sample] : A(p.value);
}

// A size: a negative one or a NaN counts as 0.
template <class A>
ENSADV_HD A size_at(const PerSample& p, int64_t sample) {
  const A v = value_at<A>(p, sample);
  return v > A(0) ? v : A(0);
}

// A batch of `numel` elements, `inner` per sample. Samples follow each other in memory.
struct Batch {
  int64_t numel = 0;
  int64_t inner = 1;
};

}  // namespace ensadv
