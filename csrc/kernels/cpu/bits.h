// The bits of a mask, computed from elements.
#pragma once

#include "../bias_act.h"

namespace ensadv {

// Bit j % 8 of byte j / 8: is y[j] greater than 0? n is at most kStrip; the last byte's other bits are 0.
void positive_bits(const float* y, int n, uint8_t* bits);
void positive_bits(const double* y, int n, uint8_t* bits);
void positive_bits(const half_t* y, int n, uint8_t* bits);
void positive_bits(const bfloat_t* y, int n, uint8_t* bits);

// The same for f.passes(y[j]).
void passing_bits(const float* y, int n, BiasAct<float> f, uint8_t* bits);
void passing_bits(const double* y, int n, BiasAct<double> f, uint8_t* bits);
void passing_bits(const half_t* y, int n, BiasAct<float> f, uint8_t* bits);
void passing_bits(const bfloat_t* y, int n, BiasAct<float> f, uint8_t* bits);

}  // namespace ensadv
