// 16-bit floats, alone and in pairs. Each operation is one of float64 that is exact, or as good as exact (odd_sum),
// rounded once.
#include <cmath>
#include <vector>

#include "opcodes.h"
#include "rounding.h"

namespace ptx_on_cpu {
namespace {

using Bits = uint16_t;

// As narrowed(v, f, nearest), in integers, for the conversion that every 16-bit kernel is full of.
uint32_t quickly_narrowed(float v, const Format& f) {
  const uint32_t u = std::bit_cast<uint32_t>(v), sign = u >> 16 & 0x8000u, size = u & 0x7fffffffu;
  if (size > 0x7f800000u) return f.nan();
  const uint32_t shift = uint32_t(23 - f.fraction),
                 lowest = 128u - (1u << (f.exponent - 1)) + 1u;  // its normal numbers' least exponent
  const uint32_t e = std::max(size >> 23, 1u);
  uint32_t kept = size - ((lowest - 1) << 23), cut = shift;
  if (e < lowest) {
    kept = (size & 0x7fffffu) | (size >> 23 ? 0x800000u : 0u);
    cut = std::min(shift + lowest - e, 31u);
  }
  kept += (1u << (cut - 1)) - 1 + (kept >> cut & 1u);
  return sign | std::min(kept >> cut, f.infinity());
}

template <class F>
struct Of {
  static double wide(Bits b) { return widened(b, F::kFormat); }
  static Bits narrow(double v) { return Bits(narrowed(v, F::kFormat, Round::nearest)); }
  static Bits add(Bits a, Bits b) { return narrow(odd_sum(wide(a), wide(b))); }
  static Bits sub(Bits a, Bits b) { return narrow(odd_sum(wide(a), -wide(b))); }
  static Bits mul(Bits a, Bits b) { return narrow(wide(a) * wide(b)); }
  static Bits fma(Bits a, Bits b, Bits c) { return narrow(odd_sum(wide(a) * wide(b), wide(c))); }
  static Bits neg(Bits a) { return a ^ 0x8000u; }
  static Bits abs(Bits a) { return a & 0x7fffu; }
  static Bits min(Bits a, Bits b) {
    const double x = wide(a), y = wide(b);
    if (x != x && y != y) return Bits(F::kFormat.nan());
    if (x != x || y != y) return x != x ? b : a;
    return x < y || (x == y && std::signbit(x)) ? a : b;
  }
  static Bits max(Bits a, Bits b) {
    const Bits r = min(neg(a), neg(b));
    return (r & 0x7fffu) > F::kFormat.infinity() ? r : neg(r);
  }
};
struct Half {
  static constexpr Format kFormat = kHalf;
};
struct Bfloat {
  static constexpr Format kFormat = kBfloat;
};

// f for one number of a register, and for both of a pair.
template <auto f>
uint32_t pairwise(uint32_t a, uint32_t b) {
  return uint32_t(f(Bits(a), Bits(b))) | uint32_t(f(Bits(a >> 16), Bits(b >> 16))) << 16;
}
template <auto f>
void binary(Opcodes& t, const std::string& name, const std::string& type) {
  define<Bits, Bits, Bits>(t, name + "." + type, [](Bits a, Bits b) { return f(a, b); });
  define<uint32_t, uint32_t, uint32_t>(t, name + "." + type + "x2",
                                       [](uint32_t a, uint32_t b) { return pairwise<f>(a, b); });
}
template <auto f>
void unary(Opcodes& t, const std::string& name, const std::string& type) {
  define<Bits, Bits>(t, name + "." + type, [](Bits a) { return f(a); });
  define<uint32_t, uint32_t>(t, name + "." + type + "x2",
                             [](uint32_t a) { return uint32_t(f(Bits(a))) | uint32_t(f(Bits(a >> 16))) << 16; });
}

template <class F>
void arithmetic(Opcodes& t, const std::string& type) {
  using O = Of<F>;
  binary<O::add>(t, "add.rn", type);
  binary<O::sub>(t, "sub.rn", type);
  binary<O::mul>(t, "mul.rn", type);
  binary<O::min>(t, "min", type);
  binary<O::max>(t, "max", type);
  unary<O::neg>(t, "neg", type);
  unary<O::abs>(t, "abs", type);
  define<Bits, Bits, Bits, Bits>(t, "fma.rn." + type, [](Bits a, Bits b, Bits c) { return O::fma(a, b, c); });
  define<uint32_t, uint32_t, uint32_t, uint32_t>(t, "fma.rn." + type + "x2", [](uint32_t a, uint32_t b, uint32_t c) {
    return uint32_t(O::fma(Bits(a), Bits(b), Bits(c))) | uint32_t(O::fma(Bits(a >> 16), Bits(b >> 16), Bits(c >> 16)))
                                                             << 16;
  });
}

template <class F>
void conversions(Opcodes& t, const std::string& type) {
  define<float, Bits>(t, "cvt.f32." + type, [](Bits b) { return all_numbers(F::kFormat)[b]; });
  define<Bits, float>(t, "cvt.rn." + type + ".f32", [](float v) { return Bits(quickly_narrowed(v, F::kFormat)); });
  define<Bits, float>(t, "cvt.rz." + type + ".f32", [](float v) { return Bits(narrowed(v, F::kFormat, Round::zero)); });
  // The first source becomes the upper half.
  define<uint32_t, float, float>(t, "cvt.rn." + type + "x2.f32", [](float high, float low) {
    return quickly_narrowed(high, F::kFormat) << 16 | quickly_narrowed(low, F::kFormat);
  });
}

// Comparisons of 16-bit registers, with PTX's answers to a NaN.
template <class F>
void comparisons(Opcodes& t, const std::string& type) {
  const auto is = [&](const std::string& name, auto f) {
    define<Pred, Bits, Bits>(t, "setp." + name + "." + type, [](Bits a, Bits b) {
      return decltype(f){}(widened(a, F::kFormat), widened(b, F::kFormat));
    });
  };
  is("eq", [](double a, double b) { return a == b; });
  is("ne", [](double a, double b) { return a < b || a > b; });
  is("lt", [](double a, double b) { return a < b; });
  is("le", [](double a, double b) { return a <= b; });
  is("gt", [](double a, double b) { return a > b; });
  is("ge", [](double a, double b) { return a >= b; });
  is("neu", [](double a, double b) { return a != b; });
  is("nan", [](double a, double b) { return a != a || b != b; });
  is("num", [](double a, double b) { return a == a && b == b; });
}

template <class F>
void all(Opcodes& t, const std::string& type) {
  arithmetic<F>(t, type);
  conversions<F>(t, type);
  comparisons<F>(t, type);
}

}  // namespace

const float* all_numbers(const Format& f) {
  const auto make = [](const Format& g) {
    std::vector<float> table(65536);
    for (uint32_t b = 0; b < 65536; ++b) table[b] = float(widened(b, g));
    return table;
  };
  static const std::vector<float> half = make(kHalf), bfloat = make(kBfloat);
  return f.exponent == kHalf.exponent ? half.data() : bfloat.data();
}

void define_halves(Opcodes& t) {
  all<Half>(t, "f16");
  all<Bfloat>(t, "bf16");
}

}  // namespace ptx_on_cpu
