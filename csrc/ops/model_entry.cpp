#include "../kernels/model_entry.h"

#include <algorithm>

#include "common.h"

namespace ensadv::ops {
namespace {

bool checked_channels_last(const char* op, const char* name, const Tensor& t) {
  if (t.is_contiguous()) return false;
  STD_TORCH_CHECK(is_channels_last(t), op, ": ", name, " must be contiguous or channels_last");
  return true;
}

Pixels pixels_of(const char* op, const char* name, const Tensor& t) {
  Pixels pixels;
  pixels.channels_last = checked_channels_last(op, name, t);
  pixels.in = in_ref(op, t);
  return pixels;
}

// [C], in the type to compute in: that of std.
const void* per_channel(const char* op, const char* name, const Tensor& t, const Tensor& like, const Tensor& std) {
  const bool in_double = std.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == like.size(1) && t.is_contiguous() && t.device() == like.device() &&
                      t.scalar_type() == (in_double ? ScalarType::Double : ScalarType::Float),
                  op, ": ", name, " must be a contiguous float32 or float64 [C] tensor on x's device");
  return t.data_ptr();
}

ModelEntryArgs arguments(const char* op, const Tensor& like, const Tensor& std, bool clamp, const Tensor& out) {
  STD_TORCH_CHECK(like.dim() == 4, op, ": images must have shape [N, C, H, W]");
  check_like(op, "out", out, like);
  ModelEntryArgs args;
  args.out = out_ref(op, out);
  STD_TORCH_CHECK(args.out.dtype != Dtype::u8, op, ": out must be floating point");
  args.out_channels_last = checked_channels_last(op, "out", out);
  args.std = per_channel(op, "std", std, like, std);
  args.in_double = std.scalar_type() == ScalarType::Double;
  const auto good = [](double v) { return v != 0.0; };
  STD_TORCH_CHECK(args.in_double ? all_readable<double>(std, good) : all_readable<float>(std, good), op,
                  ": std must not be 0");
  args.clamp = clamp;
  args.batch = like.size(0);
  args.channels = like.size(1);
  args.spatial = like.size(2) * like.size(3);
  return args;
}

// Threads share pixels.
template <class Body>
void on_cpu_pixels(const Tensor& out, const Body& body) {
  const int64_t channels = out.size(1);
  on_cpu(out.numel() / channels, body, std::max<int64_t>(1, kGrain / channels));
}

void add_delta(const char* op, const std::optional<Tensor>& delta, const Tensor& out, ModelEntryArgs& args) {
  if (!delta) return;
  check_like(op, "delta", *delta, out);
  check_apart(op, "out", out, "delta", *delta);
  args.delta = pixels_of(op, "delta", *delta);
  STD_TORCH_CHECK(args.delta.in.dtype != Dtype::u8, op, ": delta must be floating point");
}

void model_entry(const Tensor x, const std::optional<Tensor> delta, const Tensor mean, const Tensor std, bool clamp,
                 const Tensor out) {
  constexpr const char* op = "model_entry";
  ModelEntryArgs args = arguments(op, x, std, clamp, out);
  check_apart(op, "out", out, "x", x);
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
  ModelEntryArgs args = arguments(op, grad, std, clamp, out);
  check_apart(op, "out", out, "grad", grad);
  args.grad = pixels_of(op, "grad", grad);
  STD_TORCH_CHECK(args.grad.in.dtype != Dtype::u8, op, ": grad must be floating point");
  args.x.channels_last = args.out_channels_last;
  if (clamp) {
    STD_TORCH_CHECK(x, op, ": x is needed to see what was clamped");
    check_like(op, "x", *x, grad);
    check_apart(op, "out", out, "x", *x);
    args.x = pixels_of(op, "x", *x);
    STD_TORCH_CHECK(args.x.channels_last == args.out_channels_last, op, ": out must have x's memory format");
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
