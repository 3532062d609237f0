// ensemble_linear: act(x @ weight^T + bias) for all members of an ensemble, and its gradient by x.
//
// Either is one product per member, accumulated in float32 and rounded once: rows of x by rows of weight, or rows of
// the gradient by columns of weight. The mask (mask.h) has a 1 where y > 0; each of its rows begins at a byte.
#pragma once

#include "mask.h"
#include "numeric.h"
#include "tensor_ref.h"

namespace ensadv {

// out[z] = a[z] @ b[z] for each member z, where b[z] is stored as [cols, inner], or `inner_first` as [inner, cols].
struct LinearArgs {
  In a;                           // [members, batch, inner], or [batch, inner] where `shared`
  In b;                           // [members, cols, inner]; inner_first: [members, inner, cols]
  In bias;                        // [members, cols]; absent: none
  Out out;                        // [members, batch, cols], or [batch, cols] where `reduce`; all of one dtype
  const uint8_t* keep = nullptr;  // [members, batch, mask_bytes(inner)]: a counts as 0 where it has a 0
  uint8_t* mask = nullptr;        // [members, batch, mask_bytes(cols)], output; null: no activation
  int64_t members = 1;
  int32_t batch = 0, inner = 0, cols = 0;
  bool shared = false, inner_first = false;
  bool reduce = false;  // the members' products are summed
};

// What goes with a product that torch computed: out = act(out + bias), or, where `keep` is given, out = a where keep
// has a 1 and 0 elsewhere. With `keep` go neither bias nor mask.
struct LinearActArgs {
  In a;           // [rows, cols]
  In bias;        // [rows / batch, cols]; absent: none
  Out out;        // [rows, cols]
  const uint8_t* keep = nullptr;
  uint8_t* mask = nullptr;
  int64_t rows = 0, batch = 1;
  int32_t cols = 0;
};

ENSADV_HD float relu(float v) { return v < 0.0f ? 0.0f : v; }  // NaN stays NaN

// Rounds v. Returns whether the rounded number is positive.
template <class T>
ENSADV_HD uint32_t finish_output(float v, bool act, T* out) {
  *out = round_to<T>(act ? relu(v) : v);
  return to_compute(*out) > 0.0f;
}

// The CPU launchers' range counts blocks of kLinearBlock columns: those of member 0, then of member 1 and so on. Where
// `reduce` is set, the members share their blocks.
constexpr int kLinearBlock = 32;
ENSADV_HD int64_t linear_blocks(const LinearArgs& args) {
  return (args.reduce ? 1 : args.members) * ((args.cols + kLinearBlock - 1) / kLinearBlock);
}
void ensemble_linear_cpu(const LinearArgs& args, int64_t begin, int64_t end);
void ensemble_linear_plain_cpu(const LinearArgs& args, int64_t begin, int64_t end);  // never by AMX (amx.h)
int ensemble_linear_cuda(const LinearArgs& args, void* stream);
void ensemble_linear_act_cpu(const LinearActArgs& args, int64_t begin, int64_t end);  // range: rows
int ensemble_linear_act_cuda(const LinearActArgs& args, void* stream);

}  // namespace ensadv
