// sample_eps: one perturbation size per sample (Kurakin et al. 2017, section 3). It comes from word 0 of the sample's
// block 0: u = (upper 24 bits + 1/2) / 2^24.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"

namespace ensadv {

enum class EpsDist : int32_t { fixed, uniform, truncated_normal };

struct SampleEpsArgs {
  float* out = nullptr;
  int64_t n = 0;
  const int64_t* key = nullptr;
  const int64_t* index = nullptr;
  EpsDist dist = EpsDist::fixed;
  double eps_max = 0.0, sigma = 0.0;
  double mass = 0.0;  // P(|z| <= eps_max / sigma), z normal: erf(eps_max / (sigma sqrt 2))
};

// The quantile of the standard normal distribution by Wichura's AS 241, PPND16 (Applied Statistics 37, 1988), whose
// relative accuracy is 1e-16. Plain arithmetic, so that CPU and CUDA agree.
ENSADV_HD double normal_quantile(double p) {
  const double q = p - 0.5;
  if (q >= -0.425 && q <= 0.425) {
    const double r = 0.180625 - q * q;
    return q *
           (((((((2.5090809287301226727e3 * r + 3.3430575583588128105e4) * r + 6.7265770927008700853e4) * r +
                4.5921953931549871457e4) * r + 1.3731693765509461125e4) * r + 1.9715909503065514427e3) * r +
             1.3314166789178437745e2) * r + 3.3871328727963666080e0) /
           (((((((5.2264952788528545610e3 * r + 2.8729085735721942674e4) * r + 3.9307895800092710610e4) * r +
                2.1213794301586595867e4) * r + 5.3941960214247511077e3) * r + 6.8718700749205790830e2) * r +
             4.2313330701600911252e1) * r + 1.0);
  }
  double r = sqrt(-log(q < 0.0 ? p : 1.0 - p));
  double z;
  if (r <= 5.0) {
    r -= 1.6;
    z = (((((((7.74545014278341407640e-4 * r + 2.27238449892691845833e-2) * r + 2.41780725177450611770e-1) * r +
            1.27045825245236838258e0) * r + 3.64784832476320460504e0) * r + 5.76949722146069140550e0) * r +
          4.63033784615654529590e0) * r + 1.42343711074968357734e0) /
        (((((((1.05075007164441684324e-9 * r + 5.47593808499534494600e-4) * r + 1.51986665636164571966e-2) * r +
             1.48103976427480074590e-1) * r + 6.89767334985100004550e-1) * r + 1.67638483018380384940e0) * r +
          2.05319162663775882187e0) * r + 1.0);
  } else {
    r -= 5.0;
    z = (((((((2.01033439929228813265e-7 * r + 2.71155556874348757815e-5) * r + 1.24266094738807843860e-3) * r +
            2.65321895265761230930e-2) * r + 2.96560571828504891230e-1) * r + 1.78482653991729133580e0) * r +
          5.46378491116411436990e0) * r + 6.65790464350110377720e0) /
        (((((((2.04426310338993978564e-15 * r + 1.42151175831644588870e-7) * r + 1.84631831751005468180e-5) * r +
             7.86869131145613259100e-4) * r + 1.48753612908506148525e-2) * r + 1.36929880922735805310e-1) * r +
          5.99832206555887937690e-1) * r + 1.0);
  }
  return q < 0.0 ? -z : z;
}

ENSADV_HD float sample_eps_value(const SampleEpsArgs& a, int64_t i) {
  const float top = float(a.eps_max);
  if (a.dist == EpsDist::fixed) return top;
  const Words block = draw(read_key(a.key), 0, sample_id(a.index, i));
  const double u = (double(block.w[0] >> 8) + 0.5) * 0x1p-24;
  if (a.dist == EpsDist::uniform) return float(u * a.eps_max);
  const float eps = float(a.sigma * normal_quantile(0.5 + 0.5 * u * a.mass));
  return eps < top ? eps : top;
}

void sample_eps_cpu(const SampleEpsArgs& args);
int sample_eps_cuda(const SampleEpsArgs& args, void* stream);

}  // namespace ensadv
