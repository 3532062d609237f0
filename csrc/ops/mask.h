// Masks of one bit per element, as tensors.
#pragma once

#include "../kernels/mask.h"

#include "common.h"

namespace ensadv::ops {

// A mask with a bit for each element of x, whatever the mask's shape.
inline uint8_t* mask_data(const char* op, const Tensor& mask, const Tensor& x) {
  const int64_t bytes = mask_bytes(x.numel());
  ENSADV_CHECK(mask.numel() == bytes && mask.is_contiguous() && mask.scalar_type() == ScalarType::Byte &&
                   mask.device() == x.device(),
               op, "mask must be contiguous uint8 of ", bytes, " elements on ", device_name(x), ", got ",
               described(mask));
  return static_cast<uint8_t*>(mask.data_ptr());
}

// A mask [members, batch, bytes], of which each row of `cols` outputs begins at a byte.
inline uint8_t* row_mask_data(const char* op, const Tensor& mask, int64_t members, int64_t batch, int64_t cols,
                              const Tensor& out) {
  check_dense(op, "mask", mask, {members, batch, mask_bytes(cols)}, ScalarType::Byte, out);
  check_apart(op, "out", out, "mask", mask);
  return static_cast<uint8_t*>(mask.data_ptr());
}

template <class Body>
void on_cpu_blocks(int64_t numel, const Body& body) {
  on_cpu(mask_blocks(numel), body, kGrain / kMaskBlock);
}

}  // namespace ensadv::ops
