// model_entry: ((x + delta).clamp(0, 1) - mean) / std, bit for bit, rounded once to the model's dtype and written in
// its memory format; and the backward pass. A byte x counts as x / 255.
#pragma once

#include <cmath>

#include "numeric.h"
#include "tensor_ref.h"

namespace ensadv {

// A batch of images: [batch, channels, spatial], or `channels_last` [batch, spatial, channels].
struct Pixels {
  In in;
  bool channels_last = false;

  bool bytes() const { return in.data && in.dtype == Dtype::u8; }
};

struct ModelEntryArgs {
  Pixels x;
  Pixels delta;  // may be absent
  Pixels grad;   // by the result; only in the backward pass, where x is absent unless clamping
  Out out;
  bool out_channels_last = false;
  bool in_double = false;      // the compute type is double, else float
  const void* mean = nullptr;  // [channels], compute type; only in the forward pass
  const void* std = nullptr;   // [channels], compute type
  bool clamp = true;
  int64_t batch = 0, channels = 1, spatial = 1;
};

template <class A>
struct ModelEntry {
  A lo, hi;

  explicit ModelEntry(bool clamp) : lo(clamp ? A(0) : -A(INFINITY)), hi(clamp ? A(1) : A(INFINITY)) {}

  ENSADV_HD A centered(A v, A mean) const { return clamp(v, lo, hi) - mean; }
  // As in torch.clamp: the gradient passes at either end, and not where v is NaN.
  ENSADV_HD A passed(A g, A v) const { return v >= lo && v <= hi ? g : A(0); }
};

// Over pixels [begin, end) of the whole batch.
void model_entry_cpu(const ModelEntryArgs& args, int64_t begin, int64_t end);
void model_entry_grad_cpu(const ModelEntryArgs& args, int64_t begin, int64_t end);
int model_entry_cuda(const ModelEntryArgs& args, void* stream);
int model_entry_grad_cuda(const ModelEntryArgs& args, void* stream);

}  // namespace ensadv
