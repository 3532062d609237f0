// ensemble_linear: act(x @ weight^T + bias) for all members of an ensemble, and its gradient by x.
//
// Both are one product per member, accumulated in float32 and rounded once: of x's rows with weight's, or of the
// gradient's rows with weight's columns. A row of the mask has a bit per output, bit o % 8 of byte o / 8, 1 where
// y > 0 and 0 beyond the last output.
#pragma once

#include "mask.h"
#include "numeric.h"
#include "tensor_ref.h"

namespace ensadv {

// out[z] = a[z] @ b[z]: [batch, inner] by [cols, inner], or by [inner, cols] where `inner_first`.
struct LinearArgs {
  In a;                           // [members, batch, inner], or [batch, inner] where `shared`
  In b;                           // [members, cols, inner]; inner_first: [members, inner, cols]
  In bias;                        // [members, cols]; absent: none
  Out out;                        // [members, batch, cols], or [batch, cols] where `reduce`; all of one dtype
  const uint8_t* keep = nullptr;  // [members, batch, mask_bytes(inner)]: what of a counts; null: all of it
  uint8_t* mask = nullptr;        // [members, batch, mask_bytes(cols)], written; null: no activation
  int64_t members = 1;
  int32_t batch = 0, inner = 0, cols = 0;
  bool shared = false, inner_first = false;
  bool reduce = false;  // the members' products are summed
};

// out = act(out + bias), or, with `keep` and nothing else, out = a where that says so: what stands beside a product
// that was made elsewhere.
struct LinearActArgs {
  In a;           // [rows, cols]
  In bias;        // [rows / batch, cols]; absent: none
  Out out;        // [rows, cols]
  const uint8_t* keep = nullptr;
  uint8_t* mask = nullptr;
  int64_t rows = 0, batch = 1;
  int32_t cols = 0;
};

ENSADV_HD float relu(float v) { return v < 0.0f ? 0.0f : v; }  // NaN stays

// Rounds v and tells whether what is left is positive.
template <class T>
ENSADV_HD uint32_t finish_output(float v, bool act, T* out) {
  *out = round_to<T>(act ? relu(v) : v);
  return to_compute(*out) > 0.0f;
}

// Ranges: columns in blocks of kLinearBlock, members after members (columns of all members where `reduce`).
constexpr int kLinearBlock = 32;
ENSADV_HD int64_t linear_blocks(const LinearArgs& args) {
  return (args.reduce ? 1 : args.members) * ((args.cols + kLinearBlock - 1) / kLinearBlock);
}
void ensemble_linear_cpu(const LinearArgs& args, int64_t begin, int64_t end);
void ensemble_linear_plain_cpu(const LinearArgs& args, int64_t begin, int64_t end);  // the same without tiles (amx.h)
int ensemble_linear_cuda(const LinearArgs& args, void* stream);
void ensemble_linear_act_cpu(const LinearActArgs& args, int64_t begin, int64_t end);  // rows
int ensemble_linear_act_cuda(const LinearActArgs& args, void* stream);

}  // namespace ensadv
