// The CPU side of the element-wise ops: walk a range of the batch in chunks that stay in the L1 cache, with
// inputs of any dtype brought to the compute type, and results from there to their own.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../numeric.h"

namespace ensadv {

constexpr int kStrip = 1024;

// `n` values of `in` from element `i` on: the memory itself where it already holds the wanted type, else
// converted into `scratch`.
const float* load(const In& in, int64_t i, int n, float* scratch);
const double* load(const In& in, int64_t i, int n, double* scratch);

// `n` values v, at most kStrip, within the box's ends already, to their final dtype: see `finish`. v is used up.
void store(float* v, const float* c, float eps, const Box<half_t>& box, half_t* out, int n);
void store(float* v, const float* c, float eps, const Box<bfloat_t>& box, bfloat_t* out, int n);
void store(float* v, const float* c, float eps, const Box<level_t>& box, level_t* out, int n);
// The same with an eps for each element.
void store(float* v, const float* c, const float* eps, const Box<half_t>& box, half_t* out, int n);
void store(float* v, const float* c, const float* eps, const Box<bfloat_t>& box, bfloat_t* out, int n);
void store(float* v, const float* c, const float* eps, const Box<level_t>& box, level_t* out, int n);

template <class T>
constexpr bool kStored = !std::is_same_v<T, compute_t<T>>;

// The place where the results of a chunk are computed: `out` itself where that holds the compute type.
template <class T>
compute_t<T>* computed_in(T* out, compute_t<T>* scratch) {
  if constexpr (kStored<T>) return scratch;
  else return out;
}

// The box within which they are computed.
template <class T>
Box<compute_t<T>> computed_box(const Box<T>& box) {
  return {box.lo, box.hi};
}

// body(first element, count, sample) over [begin, end), never across a sample where `by_sample`.
template <class Body>
void for_each_strip(const Batch& batch, bool by_sample, int chunk, int64_t begin, int64_t end, Body body) {
  while (begin < end) {
    const int64_t sample = by_sample ? begin / batch.inner : 0;
    const int64_t stop = by_sample ? std::min(end, (sample + 1) * batch.inner) : end;
    for (int n = 0; begin < stop; begin += n) {
      n = int(std::min<int64_t>(chunk, stop - begin));
      body(begin, n, sample);
    }
  }
}

// Call body with a value of the C++ type that stands for `dtype`.
template <class Body>
void with_dtype(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::f32: return body(float());
    case Dtype::f64: return body(double());
    case Dtype::f16: return body(half_t());
    case Dtype::bf16: return body(bfloat_t());
    case Dtype::u8: return body(level_t());
  }
}

}  // namespace ensadv
