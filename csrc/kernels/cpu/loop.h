// The CPU side of the element-wise ops. They walk a range of the batch in strips, which stay in the L1 cache: inputs of
// any dtype are converted to the compute type, and results to their final dtype.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../numeric.h"

namespace ensadv {

constexpr int kStrip = 1024;  // elements of a strip, at most

// `n` values of `in` from element `i` on: the memory itself if it holds the compute type, else `scratch` after
// conversion.
const float* load(const In& in, int64_t i, int n, float* scratch);
const double* load(const In& in, int64_t i, int n, double* scratch);

// Stores `n` values v, at most kStrip, in their final dtype as `finish` does. v lies within the box and is overwritten.
void store(float* v, const float* c, float eps, const Box<half_t>& box, half_t* out, int n);
void store(float* v, const float* c, float eps, const Box<bfloat_t>& box, bfloat_t* out, int n);
void store(float* v, const float* c, float eps, const Box<level_t>& box, level_t* out, int n);
// The same with an eps for each element.
void store(float* v, const float* c, const float* eps, const Box<half_t>& box, half_t* out, int n);
void store(float* v, const float* c, const float* eps, const Box<bfloat_t>& box, bfloat_t* out, int n);
void store(float* v, const float* c, const float* eps, const Box<level_t>& box, level_t* out, int n);

template <class T>
constexpr bool kStored = !std::is_same_v<T, compute_t<T>>;

// Where the results of a strip are computed: in `out` itself if it holds the compute type, else in `scratch`.
template <class T>
compute_t<T>* computed_in(T* out, compute_t<T>* scratch) {
  if constexpr (kStored<T>) return scratch;
  else return out;
}

// The box, for results in the compute type.
template <class T>
Box<compute_t<T>> computed_box(const Box<T>& box) {
  return {box.lo, box.hi};
}

// body(first element, count, sample) for the strips of [begin, end), of at most `longest` elements. No strip crosses
// samples if `by_sample`.
template <class Body>
void for_each_strip(const Batch& batch, bool by_sample, int longest, int64_t begin, int64_t end, Body body) {
  while (begin < end) {
    const int64_t sample = by_sample ? begin / batch.inner : 0;
    const int64_t stop = by_sample ? std::min(end, (sample + 1) * batch.inner) : end;
    for (int n = 0; begin < stop; begin += n) {
      n = int(std::min<int64_t>(longest, stop - begin));
      body(begin, n, sample);
    }
  }
}

// body(T()) for the C++ type T of `dtype`.
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
