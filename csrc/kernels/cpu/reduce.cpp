#include "reduce.h"

namespace ensadv {

double fold_slots(double* slots, int used) {
  const int lanes_used = (used + kSlotPack - 1) / kSlotPack;
  double lanes[kReduceThreads];
  for (int t = 0; t < lanes_used; ++t) {
    double* s = slots + t * kSlotPack;
    for (int half = kSlotPack / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) s[j] += s[j + half];
    lanes[t] = s[0];
  }
  const int warps_used = (lanes_used + 31) / 32;
  std::fill(lanes + lanes_used, lanes + 32 * warps_used, 0.0);
  double warps[kReduceThreads / 32] = {};
  for (int w = 0; w < warps_used; ++w) {
    double* lane = lanes + 32 * w;
    for (int half = 16; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    warps[w] = lane[0];
  }
  for (int half = kReduceThreads / 64; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) warps[j] += warps[j + half];
  return warps[0];
}

}  // namespace ensadv
