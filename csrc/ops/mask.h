// Masks of one bit per element, as tensors.
#pragma once

#include "../kernels/mask.h"

#include "common.h"

namespace ensadv::ops {

inline uint8_t* mask_data(const char* op, const Tensor& mask, const Tensor& x) {
  STD_TORCH_CHECK(mask.numel() == mask_bytes(x.numel()) && mask.is_contiguous() &&
                      mask.scalar_type() == ScalarType::Byte && mask.device() == x.device(),
                  op, ": mask must be contiguous uint8 on the same device, a bit for each of ", x.numel(), " elements");
  return static_cast<uint8_t*>(mask.data_ptr());
}

template <class Body>
void on_cpu_blocks(int64_t numel, const Body& body) {
  on_cpu(mask_blocks(numel), body, kGrain / kMaskBlock);
}

}  // namespace ensadv::ops
