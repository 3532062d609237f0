#include "../kernels/model_entry.h"

#include <algorithm>

#include "common.h"

namespace ensadv::ops {
namespace {

// Is the tensor channels_last? Else it must be contiguous.
bool checked_channels_last(const char* op, const char* name, const Tensor& t) {
  if (t.is_contiguous()) return false;
  ENSADV_CHECK(is_channels_last(t), op, name, " must be contiguous or channels_last, got strides ",
               shape_text(t.strides()));
  return true;
}

Pixels pixels_of(const char* op, const char* name, const Tensor& t) {
  Pixels pixels;
  pixels.channels_last = checked_channels_last(op, name, t);
  pixels.in = in_ref(op, name, t);
  return pixels;
}

// [C], in the compute type, which is std's.
const void* per_channel(const char* op, const char* name, const Tensor& t, const Tensor& like, const Tensor& std) {
  check_dense(op, name, t, {like.size(1)}, compute_dtype(std), like);
  return t.data_ptr();
}

// `x`: the images, or the gradient in the backward pass.
ModelEntryArgs arguments(const char* op, const char* name, const Tensor& x, const Tensor& std, bool clamp,
                         const Tensor& out) {
  ENSADV_CHECK(x.dim() == 4, op, name, " must have shape [N, C, H, W], got ", shape_of(x));
  check_like(op, "out", out, x);
  check_apart(op, "out", out, name, x);
  check_floating(op, "out", out);
  ModelEntryArgs args;
  args.out = out_ref(op, "out", out);
  args.out_channels_last = checked_channels_last(op, "out", out);
  args.std = per_channel(op, "std", std, x, std);
  args.in_double = std.scalar_type() == ScalarType::Double;
  const auto bad = find_bad_number(std, [](double v) { return v != 0.0; });
  ENSADV_CHECK(!bad, op, "std must not be 0, got ", *bad);
  args.clamp = clamp;
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.spatial = x.size(2) * x.size(3);
  return args;
}

// Each thread takes a range of pixels.
template <class Body>
void on_cpu_pixels(const Tensor& out, const Body& body) {
  const int64_t channels = out.size(1);
  on_cpu(out.numel() / channels, body, std::max<int64_t>(1, kGrain / channels));
}

void add_delta(const char* op, const std::optional<Tensor>& delta, const Tensor& out, ModelEntryArgs& args) {
  if (!delta) return;
  check_like(op, "delta", *delta, out);
  check_apart(op, "out", out, "delta", *delta);
  check_floating(op, "delta", *delta);
  args.delta = pixels_of(op, "delta", *delta);
}

void model_entry(const Tensor x, const std::optional<Tensor> delta, const Tensor mean, const Tensor std, bool clamp,
                 const Tensor out) {
  constexpr const char* op = "model_entry";
  ModelEntryArgs args = arguments(op, "x", x, std, clamp, out);
  args.x = pixels_of(op, "x", x);
  add_delta(op, delta, out, args);
  args.mean = per_channel(op, "mean", mean, x, std);
  if (out.numel() == 0) return;
  if (out.is_cuda()) {
    on_cuda(op, out, [&](void* stream) { return model_entry_cuda(args, stream); });
  } else {
    on_cpu_pixels(out, [&](int64_t begin, int64_t end) { model_entry_cpu(args, begin, end); });
  }
}

void model_entry_grad(const Tensor grad, const std::optional<Tensor> x, const std::optional<Tensor> delta,
                      const Tensor std, bool clamp, const Tensor out) {
  constexpr const char* op = "model_entry_grad";
  ModelEntryArgs args = arguments(op, "grad", grad, std, clamp, out);
  check_floating(op, "grad", grad);
  args.grad = pixels_of(op, "grad", grad);
  args.x.channels_last = args.out_channels_last;
  if (clamp) {
    ENSADV_CHECK(x, op, "x must be given where clamp is true, got none");
    check_like(op, "x", *x, grad);
    check_apart(op, "out", out, "x", *x);
    args.x = pixels_of(op, "x", *x);
    ENSADV_CHECK(args.x.channels_last == args.out_channels_last, op, "out must have x's memory format, got ",
                 args.out_channels_last ? "channels_last" : "contiguous");
    add_delta(op, delta, out, args);
  }
  if (out.numel() == 0) return;
  if (out.is_cuda()) {
    on_cuda(op, out, [&](void* stream) { return model_entry_grad_cuda(args, stream); });
  } else {
    on_cpu_pixels(out, [&](int64_t begin, int64_t end) { model_entry_grad_cpu(args, begin, end); });
  }
}

ENSADV_OP(model_entry, "(Tensor x, Tensor? delta, Tensor mean, Tensor std, bool clamp, Tensor(a!) out) -> ()")
ENSADV_OP(model_entry_grad,
          "(Tensor grad, Tensor? x, Tensor? delta, Tensor std, bool clamp, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace ensadv::ops
