// Masks of one bit per element, as tensors.
#pragma once

#include "../kernels/mask.h"

#include "common.h"

namespace ensadv::ops {

// Of a mask with a bit for each element of x.
inline uint8_t* mask_data(const char* op, const Tensor& mask, const Tensor& x) {
  STD_TORCH_CHECK(mask.numel() == mask_bytes(x.numel()) && mask.is_contiguous() &&
                      mask.scalar_type() == ScalarType::Byte && mask.device() == x.device(),
                  op, ": mask must be contiguous uint8 on the same device, a bit for each of ", x.numel(), " elements");
  return static_cast<uint8_t*>(mask.data_ptr());
}

// Of a mask [rows..., bytes]: each row of `cols` outputs begins at a byte.
inline uint8_t* row_mask_data(const char* op, const Tensor& mask, std::initializer_list<int64_t> rows, int64_t cols,
                              const Tensor& out) {
  bool same = mask.dim() == int64_t(rows.size()) + 1;
  for (int64_t d = 0; same && d < int64_t(rows.size()); ++d) same = mask.size(d) == rows.begin()[d];
  STD_TORCH_CHECK(same && mask.size(mask.dim() - 1) == mask_bytes(cols) && mask.is_contiguous() &&
                      mask.device() == out.device() && mask.scalar_type() == ScalarType::Byte,
                  op, ": mask must be contiguous uint8, a byte for every 8 outputs of a row");
  check_apart(op, "out", out, "mask", mask);
  return static_cast<uint8_t*>(mask.data_ptr());
}

template <class Body>
void on_cpu_blocks(int64_t numel, const Body& body) {
  on_cpu(mask_blocks(numel), body, kGrain / kMaskBlock);
}

}  // namespace ensadv::ops
