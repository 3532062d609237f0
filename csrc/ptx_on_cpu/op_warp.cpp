// What the lanes of a warp do together: shuffles, votes, synchronisation, and products of small matrices.
//
// Lanes named by a member mask meet before the instruction runs (warp.cpp), so that here all of them are present.
#include <bit>
#include <cstring>

#include "access.h"
#include "opcodes.h"
#include "rounding.h"

namespace ptx_on_cpu {
namespace {

enum class Shuffle { up, down, butterfly, index };

// Operands: result, its predicate, source, lane, clamp and segment, members. The predicate says whether the lane that
// is read lies in the segment; where it does not, a lane keeps its own.
template <Shuffle kind>
void shuffle(Warp& w, const Instruction& i, Mask mask) {
  const uint32_t *from = w.row<uint32_t>(i.op[2]), *which = w.row<uint32_t>(i.op[3]), *c = w.row<uint32_t>(i.op[4]);
  uint32_t got[kLanes];
  bool valid[kLanes];
  each_lane(mask, [&](int l) {
    const int lane = l, segment = int(c[l] >> 8 & 31), clamp = int(c[l] & 31), b = int(which[l] & 31);
    const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
    int j = kind == Shuffle::up          ? lane - b
            : kind == Shuffle::down      ? lane + b
            : kind == Shuffle::butterfly ? lane ^ b
                                         : least | (b & ~segment);
    valid[l] = kind == Shuffle::up ? j >= most : j <= most;
    if (!valid[l]) j = lane;
    if (!(mask >> j & 1)) Lane(w, i, l).fail("reads from lane " + std::to_string(j) + ", which does not take part");
    got[l] = from[j];
  });
  each_lane(mask, [&](int l) {
    w.row<uint32_t>(i.op[0])[l] = got[l];
    if (i.op[1].exists()) w.row<bool>(i.op[1])[l] = valid[l];
  });
}

template <class D, class F>
void vote(Warp& w, const Instruction& i, Mask mask) {
  Mask yes = 0;
  each_lane(mask, [&](int l) { yes |= Mask(w.row<bool>(i.op[1])[l]) << l; });
  each_lane(mask, [&](int l) { w.row<D>(i.op[0])[l] = F{}(yes, mask); });
}

void synchronise(Warp& w, const Instruction& i, Mask mask) {
  if (mask != w.live()) Lane(w, i, __builtin_ctz(mask)).fail("synchronises a part of a warp: not supported");
  w.synchronised();
}

// Four 8 x 8 matrices of 16-bit numbers: lanes 8k to 8k + 7 say where matrix k's rows lie, and lane l gets the numbers
// 2(l % 4) and the next of its row l / 4, or of its column where `transposed`.
template <bool transposed>
void load_matrices(Warp& w, const Instruction& i, Mask mask) {
  count_traffic(w, i, mask, i.op[4], 16);
  uint16_t rows[kLanes][8];
  for (int l = 0; l < kLanes; ++l) {
    const Lane lane(w, i, l);
    lane.load(lane.reach(i.op[4]), 16, rows[l]);
  }
  for (int k = 0; k < 4; ++k)
    for (int l = 0; l < kLanes; ++l) {
      const int major = l / 4, minor = l % 4 * 2;
      const uint32_t low = transposed ? rows[8 * k + minor][major] : rows[8 * k + major][minor];
      const uint32_t high = transposed ? rows[8 * k + minor + 1][major] : rows[8 * k + major][minor + 1];
      w.row<uint32_t>(i.op[k])[l] = low | high << 16;
    }
}

// d = a b + c, 16 x 8 outputs of 16 products each, by the layouts of "mma.m16n8k16" in the PTX manual. Products are
// exact; in which order they are summed, and how it rounds, PTX leaves open: here in float64, and once.
template <const Format& kFormat>
void multiply(Warp& w, const Instruction& i, Mask) {
  double a[16][16], b[16][8];
  const float* numbers = all_numbers(kFormat);
  const auto half = [&](int operand, int lane, int which) {
    return numbers[w.row<uint32_t>(i.op[operand])[lane] >> 16 * which & 0xffff];
  };
  for (int l = 0; l < kLanes; ++l)
    for (int h = 0; h < 2; ++h) {
      for (int r = 0; r < 4; ++r) a[l / 4 + r % 2 * 8][l % 4 * 2 + h + r / 2 * 8] = half(4 + r, l, h);
      for (int r = 0; r < 2; ++r) b[l % 4 * 2 + h + r * 8][l / 4] = half(8 + r, l, h);
    }
  for (int r = 0; r < 4; ++r)
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4 + r / 2 * 8, col = l % 4 * 2 + r % 2;
      double sum = w.row<float>(i.op[10 + r])[l];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][col];
      w.row<float>(i.op[r])[l] = float(sum);
    }
}

constexpr Slot kWord{4, false}, kFloat{4, true}, kPredicate{1, false};

}  // namespace

void define_warp_wide(Opcodes& t) {
  const std::vector<Slot> shuffled{kWord, kPredicate, kWord, kWord, kWord, kWord};
  t["shfl.sync.up.b32"] = {shuffle<Shuffle::up>, Kind::warp_sync, shuffled};
  t["shfl.sync.down.b32"] = {shuffle<Shuffle::down>, Kind::warp_sync, shuffled};
  t["shfl.sync.bfly.b32"] = {shuffle<Shuffle::butterfly>, Kind::warp_sync, shuffled};
  t["shfl.sync.idx.b32"] = {shuffle<Shuffle::index>, Kind::warp_sync, shuffled};
  const auto any = [](Mask yes, Mask) { return yes != 0; };
  const auto all = [](Mask yes, Mask members) { return yes == members; };
  const auto uniform = [](Mask yes, Mask members) { return yes == 0 || yes == members; };
  const auto ballot = [](Mask yes, Mask) { return yes; };
  const std::vector<Slot> voted{kPredicate, kPredicate, kWord}, counted{kWord, kPredicate, kWord};
  t["vote.sync.any.pred"] = {vote<bool, decltype(any)>, Kind::warp_sync, voted};
  t["vote.sync.all.pred"] = {vote<bool, decltype(all)>, Kind::warp_sync, voted};
  t["vote.sync.uni.pred"] = {vote<bool, decltype(uniform)>, Kind::warp_sync, voted};
  t["vote.sync.ballot.b32"] = {vote<uint32_t, decltype(ballot)>, Kind::warp_sync, counted};
  t["bar.warp.sync"] = {synchronise, Kind::warp_sync, {kWord}};
  const std::vector<Slot> loaded{kWord, kWord, kWord, kWord, kWord};
  t["ldmatrix.sync.aligned.m8n8.x4.shared.b16"] = {load_matrices<false>, Kind::warp_sync, loaded};
  t["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"] = {load_matrices<true>, Kind::warp_sync, loaded};
  std::vector<Slot> product(14, kFloat);
  for (int k = 4; k < 10; ++k) product[size_t(k)] = kWord;
  const std::string mma = "mma.sync.aligned.m16n8k16.row.col.f32.";
  t[mma + "f16.f16.f32"] = {multiply<kHalf>, Kind::warp_sync, product};
  t[mma + "bf16.bf16.f32"] = {multiply<kBfloat>, Kind::warp_sync, product};
}

}  // namespace ptx_on_cpu
