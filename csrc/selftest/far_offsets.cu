// Elements beyond 2^32. All elements are alike, and the CPU computes only windows of them.
#include <sys/mman.h>

#include "../kernels/random_step.h"
#include "../kernels/sign_step.h"
#include "harness.h"

namespace ensadv::selftest {
namespace {

constexpr int64_t kInner = (int64_t(1) << 31) + 4, kNumel = 2 * kInner;
constexpr int64_t kBytes = 2 * kNumel;
constexpr int kByte = 0x3e, kWindow = 5000;  // bfloat16 0x3e3e, 0.186
static_assert(kInner % 3 == 0);

// kBytes on either side, on the host without memory until it is written.
class FarBuffers {
 public:
  FarBuffers() {
    size_t free = 0, total = 0;
    MUST(cudaMemGetInfo(&free, &total));
    if (free < size_t(kBytes) + (size_t(1) << 30)) {
      printf("skipped far offsets: %.1f GiB of GPU memory wanted\n", double(kBytes) / (1 << 30) + 1);
      return;
    }
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* lazy = mmap(nullptr, size_t(kBytes), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (lazy == MAP_FAILED) {
      printf("skipped far offsets: no address space on the host\n");
      return;
    }
    host_ = static_cast<char*>(lazy);
    MUST(cudaMalloc(&device_, size_t(kBytes)));
  }
  ~FarBuffers() {
    if (!host_) return;
    cudaFree(device_);
    munmap(host_, size_t(kBytes));
  }
  FarBuffers(const FarBuffers&) = delete;

  bool exist() const { return host_; }
  char* data(Side side) const { return side == Side::host ? host_ : static_cast<char*>(device_); }

 private:
  char* host_ = nullptr;
  void* device_ = nullptr;
};

// Runs cuda() on the whole, cpu(begin, end) on windows, and compares them there.
void compare(Harness& harness, const FarBuffers& buffers, const char* name,
             const std::function<void(int64_t, int64_t)>& cpu, const std::function<int()>& cuda) {
  char *host = buffers.data(Side::host), *device = buffers.data(Side::device);
  MUST(cudaMemset(device, kByte, size_t(kBytes)));
  MUST(cudaDeviceSynchronize());
  harness.must_finish(cuda(), name);
  std::string problem;
  std::vector<char> got(2 * kWindow);
  for (int64_t middle : {int64_t(kWindow / 2), kInner, int64_t(1) << 32, kNumel - kWindow / 2}) {
    const int64_t begin = std::min(middle - kWindow / 2, kNumel - kWindow);
    memset(host + 2 * begin, kByte, got.size());
    cpu(begin, begin + kWindow);
    MUST(cudaMemcpy(got.data(), device + 2 * begin, got.size(), cudaMemcpyDeviceToHost));
    if (memcmp(got.data(), host + 2 * begin, got.size())) problem = "near element " + std::to_string(middle);
  }
  harness.note(name, problem);
}

}  // namespace

void check_far_offsets(Harness& harness) {
  const FarBuffers buffers;
  if (!buffers.exist()) return;
  constexpr Dtype t = Dtype::bf16;
  const TwinPtr key = key_of(5, 6);
  const auto sizes = std::make_unique<Twin>(8, 0);
  data_as<float>(*sizes, Side::host)[0] = 0.01f;
  data_as<float>(*sizes, Side::host)[1] = 0.02f;
  sizes->upload();
  const auto sign = [&](Side side) {
    char* data = buffers.data(side);
    return SignStepArgs{{data, t}, {data, t}, {}, {data, t}, {data_of(*sizes, side)}, {}, 0, 1, {kNumel, kInner}};
  };
  compare(harness, buffers, "sign_step beyond 2^32 elements",
          [&](int64_t begin, int64_t end) { sign_step_cpu(sign(Side::host), begin, end); },
          [&] { return sign_step_cuda(sign(Side::device), harness.stream()); });
  for (int64_t channels : {1, 3}) {
    const auto random = [&](Side side) {
      char* data = buffers.data(side);
      return RandomStepArgs{{data, t}, {data, t}, ints_of(key, side), nullptr, {data_of(*sizes, side)},
                            Noise::rademacher, 0, 1, {kNumel, kInner}, {channels, kInner / channels}};
    };
    compare(harness, buffers, "random_step beyond 2^32 elements",
            [&](int64_t begin, int64_t end) { random_step_cpu(random(Side::host), begin, end); },
            [&] { return random_step_cuda(random(Side::device), harness.stream()); });
  }
}

}  // namespace ensadv::selftest
