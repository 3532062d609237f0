// Arithmetic of float32 and float64. The host's own rounds to nearest, is never fused, and keeps subnormals; what
// PTX may round otherwise says so in its name. "add.f32" without a rounding may be fused by ptxas, so that nobody
// knows its result: it is in no table.
#include <cfenv>
#include <cmath>

#include "opcodes.h"
#include "rounding.h"

namespace ptx_on_cpu {
namespace {

float flushed(float a) { return std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(0.0f, a) : a; }

// Clamped to [0, 1]; NaN gives 0.
template <class T>
T saturated(T a) {
  return a > T(0) ? (a < T(1) ? a : T(1)) : T(0);
}

enum class Op { add, sub, mul, fma };

template <Op op, class T>
T plain(T a, T b, T c) {
  if constexpr (op == Op::add) return a + b;
  if constexpr (op == Op::sub) return a - b;
  if constexpr (op == Op::mul) return a * b;
  return std::fma(a, b, c);
}

template <Op op, Round mode, bool kFlush, bool kSaturate, class T>
T computed(T a, T b, T c) {
  if constexpr (kFlush) a = flushed(a), b = flushed(b), c = flushed(c);
  T r;
  if constexpr (mode == Round::nearest)
    r = plain<op>(a, b, c);
  else
    r = with_rounding(mode, [](T x, T y, T z) { return plain<op>(x, y, z); }, a, b, c);
  if constexpr (kFlush) r = flushed(r);
  return kSaturate ? saturated(r) : r;
}

template <Op op, Round mode, bool kFlush, bool kSaturate, class T>
void one(Opcodes& t, const std::string& name) {
  if constexpr (op == Op::fma)
    define<T, T, T, T>(t, name, [](T a, T b, T c) { return computed<op, mode, kFlush, kSaturate>(a, b, c); });
  else
    define<T, T, T>(t, name, [](T a, T b) { return computed<op, mode, kFlush, kSaturate>(a, b, T(0)); });
}

template <Op op, Round mode>
void rounded(Opcodes& t, const std::string& name) {
  one<op, mode, false, false, float>(t, name + ".f32");
  one<op, mode, true, false, float>(t, name + ".ftz.f32");
  one<op, mode, false, true, float>(t, name + ".sat.f32");
  one<op, mode, true, true, float>(t, name + ".ftz.sat.f32");
  one<op, mode, false, false, double>(t, name + ".f64");
}

template <Op op>
void in_all_roundings(Opcodes& t, const std::string& name) {
  rounded<op, Round::nearest>(t, name + ".rn");
  rounded<op, Round::zero>(t, name + ".rz");
  rounded<op, Round::down>(t, name + ".rm");
  rounded<op, Round::up>(t, name + ".rp");
}

// Of a number and a NaN the number, and of the zeros -0 is the smaller one.
template <class T>
T smaller(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  return a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  return -smaller(T(-a), T(-b));
}

template <class T>
void others(Opcodes& t, const std::string& type) {
  define<T, T, T>(t, "div.rn." + type, [](T a, T b) { return a / b; });
  define<T, T>(t, "rcp.rn." + type, [](T a) { return T(1) / a; });
  define<T, T>(t, "sqrt.rn." + type, [](T a) { return std::sqrt(a); });
  define<T, T>(t, "neg." + type, [](T a) { return -a; });
  define<T, T>(t, "abs." + type, [](T a) { return std::fabs(a); });
  define<T, T, T>(t, "min." + type, [](T a, T b) { return smaller(a, b); });
  define<T, T, T>(t, "max." + type, [](T a, T b) { return larger(a, b); });
  define<T, T, T>(t, "min.NaN." + type, [](T a, T b) { return a != a || b != b ? T(NAN) : smaller(a, b); });
  define<T, T, T>(t, "max.NaN." + type, [](T a, T b) { return a != a || b != b ? T(NAN) : larger(a, b); });
}

}  // namespace

void define_floats(Opcodes& t) {
  in_all_roundings<Op::add>(t, "add");
  in_all_roundings<Op::sub>(t, "sub");
  in_all_roundings<Op::mul>(t, "mul");
  in_all_roundings<Op::fma>(t, "fma");
  others<float>(t, "f32");
  others<double>(t, "f64");
  // The start of a division in float64: the upper word of the reciprocal, the lower one is 0. A GPU's may differ in its
  // last bits, which the steps that follow correct.
  define<double, double>(t, "rcp.approx.ftz.f64", [](double a) {
    const double r = 1.0 / (std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(0.0, a) : a);
    const double upper = std::bit_cast<double>(std::bit_cast<uint64_t>(r) & 0xffffffff00000000u);
    return std::fpclassify(upper) == FP_SUBNORMAL ? std::copysign(0.0, a) : upper;
  });
}

}  // namespace ptx_on_cpu
