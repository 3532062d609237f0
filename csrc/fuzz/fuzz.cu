// Random calls of every CUDA launcher against its CPU launcher: odd lengths, misaligned bases, all dtypes and modes.
// fuzz SEED COUNT [OP]: COUNT calls from SEED on; a line for each that differs, with what draws it again, and
// "N calls, N failed". Each call runs on one of the devices that there are.
#include "fuzz.h"

namespace ensadv {
namespace {

using Case = std::string (*)(Draw&);
const std::pair<const char*, Case> kCases[] = {{"null", null_op},
                                               {"sign_step", sign_step},
                                               {"momentum_step", momentum_step},
                                               {"l2_step", l2_step},
                                               {"random_step", random_step},
                                               {"bias_act", bias_act},
                                               {"model_entry", model_entry},
                                               {"keys", keys},
                                               {"logit_grad", logit_grad},
                                               {"ensemble_linear", ensemble_linear},
                                               {"ensemble_linear_act", ensemble_linear_act}};

int run(uint32_t seed, uint32_t count, const std::string& only) {
  int devices = 0, failed = 0;
  must(int(cudaGetDeviceCount(&devices)), "cudaGetDeviceCount");
  uint32_t calls = 0;
  for (uint32_t k = seed; calls < count; ++k) {
    Draw draw(k);
    const auto& [name, body] = kCases[draw.below(int64_t(std::size(kCases)))];
    if (!only.empty() && only != name) continue;
    must(int(cudaSetDevice(int(draw.below(devices)))), "cudaSetDevice");
    ++calls;
    const std::string problem = body(draw);
    if (problem.empty()) continue;
    ++failed;
    printf("FAILED %s, seed %u: %s\n", name, k, problem.c_str());
    fflush(stdout);
  }
  printf("%u calls, %d failed\n", calls, failed);
  return failed ? 1 : 0;
}

}  // namespace
}  // namespace ensadv

int main(int argc, char** argv) {
  if (argc < 3) return fprintf(stderr, "fuzz SEED COUNT [OP]\n"), 2;
  const auto number = [](const char* text) { return uint32_t(strtoul(text, nullptr, 10)); };
  return ensadv::run(number(argv[1]), number(argv[2]), argc > 3 ? argv[3] : "");
}
