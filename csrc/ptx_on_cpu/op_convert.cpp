// Comparisons and conversions.
#include <cmath>
#include <limits>

#include "opcodes.h"
#include "rounding.h"

namespace ptx_on_cpu {
namespace {

template <class T>
void compare(Opcodes& t, const std::string& type) {
  const auto is = [&](const std::string& name, auto f) { define<Pred, T, T>(t, "setp." + name + "." + type, f); };
  is("eq", [](T a, T b) { return a == b; });
  is("ne", [](T a, T b) { return (a < b) | (a > b); });  // false for a NaN
  is("lt", [](T a, T b) { return a < b; });
  is("le", [](T a, T b) { return a <= b; });
  is("gt", [](T a, T b) { return a > b; });
  is("ge", [](T a, T b) { return a >= b; });
  if constexpr (std::is_floating_point_v<T>) {  // with u: true for a NaN
    is("equ", [](T a, T b) { return !((a < b) | (a > b)); });
    is("neu", [](T a, T b) { return a != b; });
    is("ltu", [](T a, T b) { return !(a >= b); });
    is("leu", [](T a, T b) { return !(a > b); });
    is("gtu", [](T a, T b) { return !(a <= b); });
    is("geu", [](T a, T b) { return !(a < b); });
    is("num", [](T a, T b) { return (a == a) & (b == b); });
    is("nan", [](T a, T b) { return (a != a) | (b != b); });
  } else if constexpr (std::is_unsigned_v<T>) {
    is("lo", [](T a, T b) { return a < b; });
    is("ls", [](T a, T b) { return a <= b; });
    is("hi", [](T a, T b) { return a > b; });
    is("hs", [](T a, T b) { return a >= b; });
  }
}

// The nearest number that D has; a NaN gives 0.
template <class D, class S>
D clamped(S v) {
  using Limits = std::numeric_limits<D>;
  constexpr S beyond = S(Limits::max() / 2 + 1) * S(2);  // a power of two
  if (v != v) return 0;
  return v < S(Limits::min()) ? Limits::min() : v >= beyond ? Limits::max() : D(v);
}

template <class D, class S>
void float_to_int(Opcodes& t, const std::string& types) {
  define<D, S>(t, "cvt.rni." + types, [](S v) { return clamped<D>(std::nearbyint(v)); });
  define<D, S>(t, "cvt.rzi." + types, [](S v) { return clamped<D>(std::trunc(v)); });
  define<D, S>(t, "cvt.rmi." + types, [](S v) { return clamped<D>(std::floor(v)); });
  define<D, S>(t, "cvt.rpi." + types, [](S v) { return clamped<D>(std::ceil(v)); });
}

// In the directions too; from double to float, and from integers.
template <class D, class S>
void to_float(Opcodes& t, const std::string& types) {
  define<D, S>(t, "cvt.rn." + types, [](S v) { return D(v); });
  define<D, S>(t, "cvt.rz." + types, [](S v) { return with_rounding(Round::zero, [](S x) { return D(x); }, v); });
  define<D, S>(t, "cvt.rm." + types, [](S v) { return with_rounding(Round::down, [](S x) { return D(x); }, v); });
  define<D, S>(t, "cvt.rp." + types, [](S v) { return with_rounding(Round::up, [](S x) { return D(x); }, v); });
}

template <class F>
void whole_numbers(Opcodes& t, const std::string& type) {
  const std::string types = type + "." + type;
  define<F, F>(t, "cvt.rni." + types, [](F v) { return std::nearbyint(v); });
  define<F, F>(t, "cvt.rzi." + types, [](F v) { return std::trunc(v); });
  define<F, F>(t, "cvt.rmi." + types, [](F v) { return std::floor(v); });
  define<F, F>(t, "cvt.rpi." + types, [](F v) { return std::ceil(v); });
  define<F, F>(t, "cvt.sat." + types, [](F v) { return v > F(0) ? (v < F(1) ? v : F(1)) : F(0); });
}

// Cut off, or filled up by the source's sign; .sat: the nearest number.
template <class D, class S>
void int_to_int(Opcodes& t, const std::string& types) {
  define<D, S>(t, "cvt." + types, [](S v) { return D(v); });
  define<D, S>(t, "cvt.sat." + types, [](S v) {
    using L = std::numeric_limits<D>;
    const __int128 w = v;
    return w < L::min() ? L::min() : w > L::max() ? L::max() : D(v);
  });
}

template <class S>
void from_int(Opcodes& t, const std::string& s) {
  int_to_int<uint16_t, S>(t, "u16." + s);
  int_to_int<int16_t, S>(t, "s16." + s);
  int_to_int<uint32_t, S>(t, "u32." + s);
  int_to_int<int32_t, S>(t, "s32." + s);
  int_to_int<uint64_t, S>(t, "u64." + s);
  int_to_int<int64_t, S>(t, "s64." + s);
  to_float<float, S>(t, "f32." + s);
  to_float<double, S>(t, "f64." + s);
}

// From the lower byte of a 16-bit register.
template <class D, class Byte>
void from_byte(Opcodes& t, const std::string& types) {
  define<D, uint16_t>(t, "cvt." + types, [](uint16_t v) { return D(Byte(v)); });
}

template <class S>
void from_float(Opcodes& t, const std::string& s) {
  float_to_int<uint16_t, S>(t, "u16." + s);
  float_to_int<int16_t, S>(t, "s16." + s);
  float_to_int<uint32_t, S>(t, "u32." + s);
  float_to_int<int32_t, S>(t, "s32." + s);
  float_to_int<uint64_t, S>(t, "u64." + s);
  float_to_int<int64_t, S>(t, "s64." + s);
  whole_numbers<S>(t, s);
}

}  // namespace

void define_comparisons(Opcodes& t) {
  compare<int16_t>(t, "s16");
  compare<int32_t>(t, "s32");
  compare<int64_t>(t, "s64");
  compare<uint16_t>(t, "u16");
  compare<uint32_t>(t, "u32");
  compare<uint64_t>(t, "u64");
  compare<float>(t, "f32");
  compare<double>(t, "f64");
  const auto bits = [&]<class T>(T, const std::string& type) {
    define<Pred, T, T>(t, "setp.eq." + type, [](T a, T b) { return a == b; });
    define<Pred, T, T>(t, "setp.ne." + type, [](T a, T b) { return a != b; });
  };
  bits(uint16_t(), "b16");
  bits(uint32_t(), "b32");
  bits(uint64_t(), "b64");
}

void define_conversions(Opcodes& t) {
  from_int<uint16_t>(t, "u16");
  from_int<int16_t>(t, "s16");
  from_int<uint32_t>(t, "u32");
  from_int<int32_t>(t, "s32");
  from_int<uint64_t>(t, "u64");
  from_int<int64_t>(t, "s64");
  from_byte<uint16_t, uint8_t>(t, "u16.u8");
  from_byte<int16_t, int8_t>(t, "s16.s8");
  from_byte<uint32_t, uint8_t>(t, "u32.u8");
  from_byte<int32_t, int8_t>(t, "s32.s8");
  from_byte<float, uint8_t>(t, "rn.f32.u8");
  from_float<float>(t, "f32");
  from_float<double>(t, "f64");
  define<double, float>(t, "cvt.f64.f32", [](float v) { return double(v); });
  to_float<float, double>(t, "f32.f64");
}

}  // namespace ptx_on_cpu
