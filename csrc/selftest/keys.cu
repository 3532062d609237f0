#include "../kernels/sample_eps.h"
#include "../kernels/split_key.h"
#include "harness.h"

namespace ensadv::selftest {
namespace {

// The two sides' log() may differ in the last place of a double: in the float by one spacing, for few of all samples.
void check_sample_eps(Harness& harness, EpsDist dist, bool indexed) {
  const TwinPtr key = key_of(-1, 77);
  std::string problem;
  int64_t unequal = 0, total = 0;
  for (int64_t n : {1, 255, 256, 257, 1000, 1000003}) {
    const TwinPtr index = indexed ? indices(n) : nullptr;
    Twin out(n * 4, 0);
    const auto arguments = [&](Side side) {
      return SampleEpsArgs{data_as<float>(out, side), n, ints_of(key, side), ints_of(index, side), dist, 16 / 255.,
                           8 / 255., std::erf(std::sqrt(2.0))};
    };
    sample_eps_cpu(arguments(Side::host));
    harness.must_finish(sample_eps_cuda(arguments(Side::device), harness.stream()), "sample_eps");
    const std::vector<char> got = out.download();
    for (int64_t i = 0; i < n; ++i, ++total) {
      int32_t a, b;
      memcpy(&a, got.data() + 4 * i, 4);
      memcpy(&b, out.host() + 4 * i, 4);
      unequal += a != b;
      if (std::abs(int64_t(a) - b) > (dist == EpsDist::truncated_normal))
        problem = "n = " + std::to_string(n) + ", element " + std::to_string(i);
    }
  }
  if (problem.empty() && unequal * 1000 > total) problem = std::to_string(unequal) + " differ by one spacing";
  const char* names[] = {"fixed", "uniform", "truncated_normal"};
  harness.note(std::string("sample_eps ") + names[int(dist)] + (indexed ? ", index" : ""), problem);
}

void check_split_key(Harness& harness) {
  const TwinPtr key = key_of(INT64_MIN, INT64_MAX);
  std::string problem;
  for (int64_t n : {1, 2, 255, 256, 257, 300007}) {
    Twin out(n * 16, 0);
    const auto arguments = [&](Side side) { return SplitKeyArgs{ints_of(key, side), data_as<int64_t>(out, side), n}; };
    split_key_cpu(arguments(Side::host));
    harness.must_finish(split_key_cuda(arguments(Side::device), harness.stream()), "split_key");
    const std::vector<char> got = out.download();
    if (memcmp(got.data(), out.host(), got.size())) problem = "n = " + std::to_string(n);
  }
  harness.note("split_key", problem);
}

}  // namespace

void check_keys(Harness& harness) {
  for (EpsDist dist : {EpsDist::fixed, EpsDist::uniform, EpsDist::truncated_normal})
    for (bool indexed : {false, true}) check_sample_eps(harness, dist, indexed);
  check_split_key(harness);
}

}  // namespace ensadv::selftest
