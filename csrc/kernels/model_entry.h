// model_entry: an image (+ delta) -> clamp to [0, 1] -> normalise -> the model's dtype and memory format; and its
// backward pass. Bit for bit ((x + delta).clamp(0, 1) - mean) / std, rounded once; bytes enter as x / 255.
#pragma once

#include <cmath>

#include "numeric.h"
#include "tensor_ref.h"

namespace ensadv {

// A batch of images, [batch, channels, spatial] or, `channels_last`, [batch, spatial, channels].
struct Pixels {
  In in;
  bool channels_last = false;

  bool bytes() const { return in.data && in.dtype == Dtype::u8; }
};

struct ModelEntryArgs {
  Pixels x;
  Pixels delta;  // may be absent
  Pixels grad;   // by the result; the backward pass only, in which x is absent where nothing is clamped
  Out out;
  bool out_channels_last = false;
  bool in_double = false;           // computes in double, not float
  const void* mean = nullptr;  // [channels], compute type; the forward pass only
  const void* std = nullptr;   // [channels], compute type
  bool clamp = true;
  int64_t batch = 0, channels = 1, spatial = 1;
};

template <class A>
struct ModelEntry {
  A lo, hi;

  explicit ModelEntry(bool clamp) : lo(clamp ? A(0) : -A(INFINITY)), hi(clamp ? A(1) : A(INFINITY)) {}

  ENSADV_HD A centered(A v, A mean) const { return clamp(v, lo, hi) - mean; }
  // As torch.clamp: what lies on either end passes, a NaN does not.
  ENSADV_HD A passed(A g, A v) const { return v >= lo && v <= hi ? g : A(0); }
};

// Over pixels [begin, end) of the whole batch.
void model_entry_cpu(const ModelEntryArgs& args, int64_t begin, int64_t end);
void model_entry_grad_cpu(const ModelEntryArgs& args, int64_t begin, int64_t end);
int model_entry_cuda(const ModelEntryArgs& args, void* stream);
int model_entry_grad_cuda(const ModelEntryArgs& args, void* stream);

}  // namespace ensadv
