// Roundings that the host does not do by itself.
#pragma once

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace ptx_on_cpu {

enum class Round { nearest, zero, down, up };

inline int fenv_mode(Round mode) {
  return mode == Round::zero   ? FE_TOWARDZERO
         : mode == Round::down ? FE_DOWNWARD
         : mode == Round::up   ? FE_UPWARD
                               : FE_TONEAREST;
}

// f(a...) in this rounding mode. Volatile, so that the compiler moves nothing out of it.
template <class F, class... T>
auto with_rounding(Round mode, F f, T... a) {
  std::fesetround(fenv_mode(mode));
  volatile std::common_type_t<T...> in[] = {a...};
  const auto call = [&]<size_t... k>(std::index_sequence<k...>) { return f(std::common_type_t<T...>(in[k])...); };
  volatile auto out = call(std::index_sequence_for<T...>());
  std::fesetround(FE_TONEAREST);
  return std::remove_volatile_t<decltype(out)>(out);
}

// A 16-bit format by its exponent's and fraction's bits: float16 5 and 10, bfloat16 8 and 7.
struct Format {
  int exponent, fraction;
  uint32_t infinity() const { return ((1u << exponent) - 1) << fraction; }
  uint32_t nan() const { return 0x7fffu; }  // what PTX calls canonical
};
constexpr Format kHalf{5, 10}, kBfloat{8, 7};

// v in this format, rounded once; every step but the last is exact.
inline uint32_t narrowed(double v, const Format& f, Round mode) {
  if (v != v) return f.nan();
  const uint32_t sign = std::signbit(v) ? 0x8000u : 0;
  const double size = std::fabs(v);
  const int bias = (1 << (f.exponent - 1)) - 1;
  int e = 0;
  std::frexp(size, &e);
  e = std::max(e - 1, 1 - bias);                           // below it numbers are subnormal
  const double scaled = std::ldexp(size, f.fraction - e);  // in units of the last place
  const bool away = sign ? mode == Round::down : mode == Round::up;
  const double whole = mode == Round::nearest ? std::nearbyint(scaled) : away ? std::ceil(scaled) : std::floor(scaled);
  if (std::isinf(v)) return sign | f.infinity();
  // A fraction that reaches the next power of two carries into the exponent, as it should.
  const double unit = double(1u << f.fraction);
  const double bits = whole < unit ? whole : double(e + bias - 1) * unit + whole;
  if (bits < f.infinity()) return sign | uint32_t(bits);
  return sign | (mode == Round::nearest || away ? f.infinity() : f.infinity() - 1);
}

inline double widened(uint32_t bits, const Format& f) {
  const uint32_t size = bits & 0x7fffu, fraction = size & ((1u << f.fraction) - 1), e = size >> f.fraction;
  const int bias = (1 << (f.exponent - 1)) - 1;
  double v = e == 0 ? std::ldexp(double(fraction), 1 - bias - f.fraction)
                    : std::ldexp(double(fraction + (1u << f.fraction)), int(e) - bias - f.fraction);
  if (size >= f.infinity()) v = fraction ? NAN : INFINITY;
  return bits & 0x8000u ? -v : v;
}

// widened() of all 65536 patterns.
const float* all_numbers(const Format& f);

// a + b, exactly or with an odd last bit where that is not to be had: rounding it again, to half as many bits, is as
// rounding the exact sum.
inline double odd_sum(double a, double b) {
  const double s = a + b;
  if (!std::isfinite(s)) return s;
  const double t = s - a, error = (a - (s - t)) + (b - t);
  uint64_t bits = std::bit_cast<uint64_t>(s);
  if (error == 0.0 || bits & 1) return s;
  return std::bit_cast<double>((error > 0) == (s > 0) ? bits + 1 : bits - 1);
}

}  // namespace ptx_on_cpu
