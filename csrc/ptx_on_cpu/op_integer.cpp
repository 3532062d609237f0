// Arithmetic of integers. Signed numbers wrap, as the machine's do.
#include <algorithm>

#include "opcodes.h"

namespace ptx_on_cpu {
namespace {

using u64 = uint64_t;
template <class T>
using Wide = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                                std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
template <class T>
using Twice = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;

template <class T>
T divided(T a, T b, bool rest) {
  if (b == 0) throw Fault("divides by zero");
  if (std::is_signed_v<T> && b == T(-1)) return rest ? T(0) : T(0 - u64(a));  // the lowest number has no negative
  return rest ? T(a % b) : T(a / b);
}

// The same bits, signed or not.
template <class T>
void modular(Opcodes& t, const std::string& type) {
  define<T, T, T>(t, "add." + type, [](T a, T b) { return T(u64(a) + u64(b)); });
  define<T, T, T>(t, "sub." + type, [](T a, T b) { return T(u64(a) - u64(b)); });
  define<T, T, T>(t, "mul.lo." + type, [](T a, T b) { return T(u64(a) * u64(b)); });
  define<T, T, T, T>(t, "mad.lo." + type, [](T a, T b, T c) { return T(u64(a) * u64(b) + u64(c)); });
}

template <class T>
void ordered(Opcodes& t, const std::string& type) {
  modular<T>(t, type);
  define<T, T, T>(t, "min." + type, [](T a, T b) { return std::min(a, b); });
  define<T, T, T>(t, "max." + type, [](T a, T b) { return std::max(a, b); });
  define<T, T, T>(t, "div." + type, [](T a, T b) { return divided(a, b, false); });
  define<T, T, T>(t, "rem." + type, [](T a, T b) { return divided(a, b, true); });
  define<T, T, T>(t, "mul.hi." + type, [](T a, T b) { return T(Twice<T>(a) * Twice<T>(b) >> 8 * sizeof(T)); });
  define<T, T, uint32_t>(t, "shr." + type, [](T a, uint32_t n) {  // whatever is shifted out is gone
    constexpr uint32_t most = 8 * sizeof(T) - 1;
    return n > most ? (std::is_signed_v<T> ? T(a >> most) : T(0)) : T(a >> n);
  });
  if constexpr (sizeof(T) < 8) {
    using W = Wide<T>;
    define<W, T, T>(t, "mul.wide." + type, [](T a, T b) { return W(u64(a) * u64(b)); });
    define<W, T, T, W>(t, "mad.wide." + type, [](T a, T b, W c) { return W(u64(a) * u64(b) + u64(c)); });
  }
  if constexpr (std::is_signed_v<T>) {
    define<T, T>(t, "neg." + type, [](T a) { return T(0 - u64(a)); });
    define<T, T>(t, "abs." + type, [](T a) { return a < 0 ? T(0 - u64(a)) : a; });
  }
}

}  // namespace

void define_integers(Opcodes& t) {
  ordered<int16_t>(t, "s16");
  ordered<int32_t>(t, "s32");
  ordered<int64_t>(t, "s64");
  ordered<uint16_t>(t, "u16");
  ordered<uint32_t>(t, "u32");
  ordered<uint64_t>(t, "u64");
}

}  // namespace ptx_on_cpu
