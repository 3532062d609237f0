// Logic, shifts, bit fields, byte permutes, moves and selections.
#include <algorithm>
#include <bit>

#include "opcodes.h"

namespace ptx_on_cpu {
namespace {

template <class T>
void logic(Opcodes& t, const std::string& type) {
  define<T, T, T>(t, "and." + type, [](T a, T b) { return T(a & b); });
  define<T, T, T>(t, "or." + type, [](T a, T b) { return T(a | b); });
  define<T, T, T>(t, "xor." + type, [](T a, T b) { return T(a ^ b); });
  define<T, T>(t, "not." + type, [](T a) { return std::is_same_v<T, bool> ? T(!a) : T(~uint64_t(a)); });
}

template <class T>
void moves(Opcodes& t, const std::string& type) {
  define<T, T>(t, "mov." + type, [](T a) { return a; });
}
template <class T>
void selections(Opcodes& t, const std::string& type) {
  define<T, T, T, Pred>(t, "selp." + type, [](T a, T b, Pred p) { return T(b ^ ((a ^ b) & -T(p))); });
}

template <class T>
void shifts(Opcodes& t, const std::string& type) {
  constexpr uint32_t bits = 8 * sizeof(T);
  define<T, T, uint32_t>(t, "shl." + type, [](T a, uint32_t n) { return n < bits ? T(uint64_t(a) << n) : T(0); });
  define<T, T, uint32_t>(t, "shr." + type, [](T a, uint32_t n) { return n < bits ? T(a >> n) : T(0); });
}

template <class T>
void fields(Opcodes& t, const std::string& type) {
  constexpr uint32_t bits = 8 * sizeof(T);
  // `len` bits of a at `pos` of b; what does not fit is cut off.
  define<T, T, T, uint32_t, uint32_t>(t, "bfi." + type, [](T a, T b, uint32_t pos, uint32_t len) {
    pos &= 0xff;
    len &= 0xff;
    if (pos >= bits || len == 0) return b;
    const T ones = T(len >= bits ? ~T(0) : (T(1) << len) - 1) << pos;
    return T((b & ~ones) | (a << pos & ones));
  });
  define<uint32_t, T>(t, "popc." + type, [](T a) { return uint32_t(std::popcount(a)); });
  define<uint32_t, T>(t, "clz." + type, [](T a) { return uint32_t(std::countl_zero(a)); });
  define<T, T>(t, "brev." + type, [](T a) {
    T r = 0;
    for (uint32_t k = 0; k < bits; ++k) r |= T(a >> k & 1) << (bits - 1 - k);
    return r;
  });
  // How far the highest one is from the top; all ones where there is none.
  const std::string u = "u" + std::to_string(bits);
  define<uint32_t, T>(t, "bfind.shiftamt." + u, [](T a) { return a ? uint32_t(std::countl_zero(a)) : ~0u; });
  define<uint32_t, T>(t, "bfind." + u, [](T a) { return a ? bits - 1 - uint32_t(std::countl_zero(a)) : ~0u; });
}

uint32_t extract(uint32_t a, uint32_t pos, uint32_t len) {
  pos &= 0xff;
  len &= 0xff;
  const uint64_t moved = pos < 32 ? a >> pos : 0;
  return uint32_t(len >= 32 ? moved : moved & ((1ull << len) - 1));
}

int32_t extract_signed(int32_t a, uint32_t pos, uint32_t len) {
  pos &= 0xff;
  len &= 0xff;
  if (len == 0) return 0;
  const uint32_t top = std::min(pos + len - 1, 31u);  // where the sign is taken from
  const int64_t moved = int64_t(a) << (31 - top) << 32;
  return int32_t(moved >> 32 >> (31 - top) >> std::min(pos, 31u));
}

// Four bytes out of the eight of b and a; a selector's highest bit asks for the sign of its byte instead.
uint32_t permute(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t r = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t s = selectors >> 4 * k & 0xf;
    uint32_t byte = bytes >> 8 * (s & 7) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << 8 * k;
  }
  return r;
}

uint32_t by_table(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t r = 0;
  for (int k = 0; k < 8; ++k)
    if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return r;
}

void words(Opcodes& t) {
  using u = uint32_t;
  define<u, u, u, u>(t, "prmt.b32", [](u a, u b, u c) { return permute(a, b, c); });
  define<u, u, u, u, u>(t, "lop3.b32", [](u a, u b, u c, u table) { return by_table(a, b, c, table); });
  define<u, u, u, u>(t, "bfe.u32", [](u a, u pos, u len) { return extract(a, pos, len); });
  define<int32_t, int32_t, u, u>(t, "bfe.s32", [](int32_t a, u pos, u len) { return extract_signed(a, pos, len); });
  define<u, u, u, u>(t, "shf.l.wrap.b32", [](u a, u b, u n) { return u((uint64_t(b) << 32 | a) << (n & 31) >> 32); });
  define<u, u, u, u>(t, "shf.r.wrap.b32", [](u a, u b, u n) { return u((uint64_t(b) << 32 | a) >> (n & 31)); });
  define<u, u, u, u>(t, "shf.l.clamp.b32", [](u a, u b, u n) {
    return u(((unsigned __int128)(uint64_t(b) << 32 | a) << std::min(n, 32u)) >> 32);
  });
  define<u, u, u, u>(t, "shf.r.clamp.b32",
                     [](u a, u b, u n) { return u((uint64_t(b) << 32 | a) >> std::min(n, 32u)); });
}

// A register taken apart into two of half its size, or put together from them.
template <class W, class H>
void halves(Opcodes& t, const std::string& type) {
  define<W, H, H>(t, "pack." + type, [](H low, H high) { return W(W(high) << 8 * sizeof(H) | low); });
  define<H, W>(t, "low." + type, [](W a) { return H(a); });
  define<H, W>(t, "high." + type, [](W a) { return H(a >> 8 * sizeof(H)); });
}

}  // namespace

void define_bits(Opcodes& t) {
  logic<bool>(t, "pred");
  logic<uint16_t>(t, "b16");
  logic<uint32_t>(t, "b32");
  logic<uint64_t>(t, "b64");
  moves<bool>(t, "pred");
  for (const char* type : {"b16", "u16", "s16"}) selections<uint16_t>(t, type);
  for (const char* type : {"b32", "u32", "s32", "f32"}) selections<uint32_t>(t, type);
  for (const char* type : {"b64", "u64", "s64", "f64"}) selections<uint64_t>(t, type);
  t["selp.f32"].slots = {kSlot<float>, kSlot<float>, kSlot<float>, kSlot<Pred>};  // whose bits are selected
  t["selp.f64"].slots = {kSlot<double>, kSlot<double>, kSlot<double>, kSlot<Pred>};
  for (const char* type : {"b16", "u16", "s16"}) moves<uint16_t>(t, type);
  for (const char* type : {"b32", "u32", "s32"}) moves<uint32_t>(t, type);
  for (const char* type : {"b64", "u64", "s64"}) moves<uint64_t>(t, type);
  moves<float>(t, "f32");
  moves<double>(t, "f64");
  shifts<uint16_t>(t, "b16");
  shifts<uint32_t>(t, "b32");
  shifts<uint64_t>(t, "b64");
  fields<uint32_t>(t, "b32");
  fields<uint64_t>(t, "b64");
  words(t);
  halves<uint32_t, uint16_t>(t, "b32");
  halves<uint64_t, uint32_t>(t, "b64");
  // Addresses: global ones are the host's, shared ones count from 0.
  define<uint64_t, uint64_t>(t, "cvta.to.global.u64", [](uint64_t a) { return a; });
  define<uint64_t, uint64_t>(t, "cvta.global.u64", [](uint64_t a) { return a; });
  define<uint64_t, uint64_t>(t, "cvta.shared.u64", [](uint64_t a) { return a | kSharedWindow; });
  define<uint64_t, uint64_t>(t, "cvta.to.shared.u64", [](uint64_t a) { return a & ~kSharedWindow; });
  define<uint64_t, uint64_t>(t, "cvta.local.u64", [](uint64_t a) { return a | kLocalWindow; });
  define<uint64_t, uint64_t>(t, "cvta.to.local.u64", [](uint64_t a) { return a & ~kLocalWindow; });
}

}  // namespace ptx_on_cpu
