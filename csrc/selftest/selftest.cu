// Every CUDA launcher against its CPU launcher, bit for bit (a NaN equals any NaN): one line per case, then
// "N passed, N failed". Exit status 0, 1 on a failure, 77 where there is no usable GPU. Buffers are allocated to
// the byte, so that compute-sanitizer sees every access beyond them.
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "../kernels/act_grad.h"
#include "../kernels/bias_act.h"
#include "../kernels/cuda/launch.h"
#include "../kernels/ensemble_linear.h"
#include "../kernels/l2_step.h"
#include "../kernels/logit_grad.h"
#include "../kernels/model_entry.h"
#include "../kernels/momentum_step.h"
#include "../kernels/null.h"
#include "../kernels/random_step.h"
#include "../kernels/sample_eps.h"
#include "../kernels/sign_step.h"
#include "../kernels/split_key.h"

namespace ensadv {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A failed call leaves the device in no state to go on from.
void must(int error, const char* what) {
  if (error == 0) return;
  printf("FAILED %s: %s\n", what, cuda_error_text(error));
  exit(1);
}
#define MUST(call) must(int(call), #call)

struct Tally {
  int passed = 0, failed = 0;
  // `problem` is empty where the case holds.
  void note(const std::string& name, const std::string& problem) {
    ++(problem.empty() ? passed : failed);
    printf("%s %s%s%s\n", problem.empty() ? "ok    " : "FAILED", name.c_str(), problem.empty() ? "" : ": ",
           problem.c_str());
    fflush(stdout);
  }
};

const char* name_of(Dtype d) {
  switch (d) {
    case Dtype::f32: return "float32";
    case Dtype::f16: return "float16";
    case Dtype::bf16: return "bfloat16";
    case Dtype::u8: return "uint8";
    default: return "float64";
  }
}

// `bytes` on both sides, `lead` bytes past an aligned address.
class Twin {
 public:
  Twin(int64_t bytes, int64_t lead) : host_(size_t(lead + bytes), char(0xff)), lead_(lead) {
    MUST(cudaMalloc(&device_, host_.size()));
    upload();
  }
  ~Twin() { cudaFree(device_); }
  Twin(const Twin&) = delete;

  char* host() { return host_.data() + lead_; }
  char* device() { return static_cast<char*>(device_) + lead_; }
  void upload() {
    MUST(cudaMemcpy(device_, host_.data(), host_.size(), cudaMemcpyHostToDevice));
    MUST(cudaDeviceSynchronize());  // the launchers' stream does not wait for this one
  }
  std::vector<char> download() const {
    std::vector<char> result(host_.size());
    MUST(cudaMemcpy(result.data(), device_, result.size(), cudaMemcpyDeviceToHost));
    return result;
  }
  // Empty, or where device memory differs from the host's, what lies before the base included.
  std::string difference(Dtype dtype) const {
    if (host_.empty()) return "";
    const std::vector<char> got = download();
    if (memcmp(got.data(), host_.data(), size_t(lead_))) return "wrote before its base";
    const int64_t size = size_of(dtype), n = (int64_t(got.size()) - lead_) / size;
    for (int64_t i = 0; i < n; ++i) {
      const char *a = got.data() + lead_ + i * size, *b = host_.data() + lead_ + i * size;
      if (memcmp(a, b, size_t(size)) && !(is_nan(a, dtype) && is_nan(b, dtype)))
        return "element " + std::to_string(i) + " of " + std::to_string(n) + ": CUDA " + show(a, dtype) + ", CPU " +
               show(b, dtype);
    }
    return "";
  }

 private:
  static double number(const char* p, Dtype dtype) {
    float f;
    double d;
    half_t h;
    bfloat_t b;
    switch (dtype) {
      case Dtype::u8: return uint8_t(*p);
      case Dtype::f32: memcpy(&f, p, 4); return f;
      case Dtype::f16: memcpy(&h, p, 2); return to_compute(h);
      case Dtype::bf16: memcpy(&b, p, 2); return to_compute(b);
      default: memcpy(&d, p, 8); return d;
    }
  }
  static bool is_nan(const char* p, Dtype dtype) { return std::isnan(number(p, dtype)); }
  static std::string show(const char* p, Dtype dtype) {
    char text[40];
    snprintf(text, sizeof text, "%.9g", number(p, dtype));
    return text;
  }

  std::vector<char> host_;
  int64_t lead_;
  void* device_ = nullptr;
};
using TwinPtr = std::unique_ptr<Twin>;

constexpr float kSpecials[] = {0.f,   -0.f,   1.f,      -1.f,    kNan,      kInf,      -kInf,    1e-40f, -1e-45f,
                               6e-8f, -3e-8f, 1.00001f, 65504.f, -65520.f,  3.4e38f,   -3.4e38f, 0.5f,   1e-30f};

template <class T>
T narrow(double v) {
  if constexpr (sizeof(T) == 1) {
    return {uint8_t(v > 0.0 ? v < 1.0 ? 255.0 * v + 0.5 : 255.0 : 0.0)};
  } else if constexpr (sizeof(T) == 2) {
    T t{};
    t.bits = uint16_t(round_bits(float(v), t));
    return t;
  } else {
    return T(v);
  }
}

// Random numbers in [lo, hi), every seventh a special one (or, where these would drown the rest, a zero or a NaN).
TwinPtr random_values(Dtype dtype, int64_t n, double lo, double hi, bool misaligned, uint32_t seed,
                      bool specials = true) {
  auto twin = std::make_unique<Twin>(n * size_of(dtype), misaligned ? size_of(dtype) : 0);
  std::minstd_rand random(seed);
  const auto fill = [&](auto t) {
    using T = decltype(t);
    T* dst = reinterpret_cast<T*>(twin->host());
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t r = random();
      const double u = double(random()) / double(std::minstd_rand::max());
      const double special = specials ? kSpecials[r / 7 % std::size(kSpecials)] : r / 7 % 2 ? 0.0 : NAN;
      dst[i] = narrow<T>(r % 7 == 0 ? special : lo + (hi - lo) * u);
    }
  };
  switch (dtype) {
    case Dtype::f32: fill(float()); break;
    case Dtype::f16: fill(half_t()); break;
    case Dtype::bf16: fill(bfloat_t()); break;
    case Dtype::u8: fill(level_t()); break;
    default: fill(double()); break;
  }
  twin->upload();
  return twin;
}

// One size per sample, negative ones and NaN among them.
TwinPtr random_sizes(Dtype dtype, int64_t n, uint32_t seed) {
  return random_values(dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32, n, -0.1, 0.3, false, seed);
}

TwinPtr indices(int64_t n) {
  auto twin = std::make_unique<Twin>(n * 8, 0);
  for (int64_t i = 0; i < n; ++i) reinterpret_cast<int64_t*>(twin->host())[i] = 7919 * i + 0xfffffff0;
  twin->upload();
  return twin;
}

TwinPtr key_of(int64_t seed, int64_t offset) {
  auto twin = std::make_unique<Twin>(16, 0);
  reinterpret_cast<int64_t*>(twin->host())[0] = seed;
  reinterpret_cast<int64_t*>(twin->host())[1] = offset;
  twin->upload();
  return twin;
}

In host_in(const TwinPtr& t, Dtype d) { return {t ? t->host() : nullptr, d}; }
In device_in(const TwinPtr& t, Dtype d) { return {t ? t->device() : nullptr, d}; }
const int64_t* host_ints(const TwinPtr& t) { return t ? reinterpret_cast<const int64_t*>(t->host()) : nullptr; }
const int64_t* device_ints(const TwinPtr& t) { return t ? reinterpret_cast<const int64_t*>(t->device()) : nullptr; }

struct Shape {
  int64_t samples, inner;
};
// Samples shorter than a pack, odd ends, whole packs, one more and one less; the last is more than one pass of the
// largest grid.
const Shape kShapes[] = {{1, 1},   {9, 1},    {5, 3},    {1, 7},    {4, 8},     {3, 9},      {2, 16},     {7, 31},
                         {4, 257}, {3, 1023}, {2, 2048}, {2, 3072}, {1, 65537}, {3, 20000}, {3, 900001}};

class Selftest {
 public:
  Selftest() { MUST(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Selftest() { cudaStreamDestroy(stream_); }

  int run() {
    conversions();
    philox_words();
    quantile();
    for (Dtype d : kAll) null_op(d);
    steps();
    random_steps();
    sample_epses();
    split_keys();
    model_entries();
    for (Dtype d : {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64}) bias_acts(d);
    logit_grads();
    ensemble_linears();
    far_offsets();
    printf("%d passed, %d failed\n", tally_.passed, tally_.failed);
    return tally_.failed ? 1 : 0;
  }

 private:
  static constexpr Dtype kAll[] = {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64, Dtype::u8};

  void launched(int error, const char* what) {
    must(error, what);
    must(int(cudaStreamSynchronize(stream_)), what);
  }

  // One case over all shapes; `body` returns what is wrong with this one.
  void over_shapes(const std::string& name, const std::function<std::string(const Shape&)>& body) {
    std::string problem;
    for (const Shape& shape : kShapes) {
      problem = body(shape);
      if (problem.empty()) continue;
      problem = "shape [" + std::to_string(shape.samples) + ", " + std::to_string(shape.inner) + "] " + problem;
      break;
    }
    tally_.note(name, problem);
  }

  void null_op(Dtype dtype) {
    for (bool misaligned : {false, true})
      over_shapes(std::string("null ") + name_of(dtype) + (misaligned ? " misaligned" : ""), [&](const Shape& s) {
        const int64_t n = s.samples * s.inner;
        const TwinPtr x = random_values(dtype, n, 0, 1, misaligned, 1);
        Twin out(n * size_of(dtype), 0);
        null_cpu({host_in(x, dtype), {out.host(), dtype}, {n, s.inner}}, 0, n);
        launched(null_cuda({device_in(x, dtype), {out.device(), dtype}, {n, s.inner}}, stream_), "null");
        return out.difference(dtype);
      });
  }

  struct Variant {
    const char* name;
    bool ball = false, step_n = false, eps_n = false, misaligned_in = false, misaligned_out = false, in_place = false;
    double lo = 0.0, hi = 1.0;
  };

  enum class Step { sign, momentum, l2, project };

  // One of the ops that step along a gradient, with all its arguments; project: l2_step without a gradient.
  void step(Step op, Dtype xt, Dtype gt, Dtype ot, const Variant& v) {
    const char* op_name = op == Step::sign ? "sign_step" : op == Step::momentum ? "momentum_step" : "l2_step";
    const bool reduces = op != Step::sign;
    const std::string grad_name = op == Step::project ? "none" : name_of(gt);
    const std::string name =
        std::string(op_name) + " " + name_of(xt) + " grad " + grad_name + " out " + name_of(ot) + ", " + v.name;
    const Dtype wide = ot == Dtype::f64 ? Dtype::f64 : Dtype::f32;
    over_shapes(name, [&](const Shape& s) {
      const int64_t n = s.samples * s.inner, chunks = s.samples * chunks_of(s.inner).count;
      // An infinite number switches a reducing op off for its whole sample, so these get specials now and then.
      const bool specials = !reduces || s.inner % 3 == 0;
      const TwinPtr x = random_values(xt, n, -0.05, 1.05, v.misaligned_in, 1, specials);
      const TwinPtr grad =
          op == Step::project ? nullptr : random_values(gt, n, -1, 1, v.misaligned_in, 2, specials);
      const TwinPtr center = v.ball ? random_values(xt, n, 0, 1, v.misaligned_in, 3, specials) : nullptr;
      const TwinPtr step = v.step_n ? random_sizes(xt, s.samples, 4) : nullptr;
      const TwinPtr eps = v.eps_n ? random_sizes(xt, s.samples, 5) : nullptr;
      const TwinPtr momentum = random_values(wide, op == Step::momentum ? n : 0, -1, 1, v.misaligned_in, 6, false);
      Twin grad_sums(reduces ? 8 * chunks : 0, 0), delta_sums(reduces ? 8 * chunks : 0, 0);
      const TwinPtr fresh =
          v.in_place ? nullptr : std::make_unique<Twin>(n * size_of(ot), v.misaligned_out ? size_of(ot) : 0);
      Twin& out = fresh ? *fresh : *x;

      const auto fill = [&](auto args, auto data) {
        args.x = {data(x.get()), xt};
        args.grad = {data(grad.get()), gt};
        args.center = {data(center.get()), xt};
        args.out = {data(&out), ot};
        args.step = {data(step.get()), reduces ? 0.5 : -8 / 255.};
        args.eps = {data(eps.get()), 8 / 255.};
        args.lo = v.lo;
        args.hi = v.hi;
        args.batch = {n, s.inner};
        return args;
      };
      const auto host = [](Twin* t) { return t ? static_cast<void*>(t->host()) : nullptr; };
      const auto device = [](Twin* t) { return t ? static_cast<void*>(t->device()) : nullptr; };
      const auto doubles = [](void* p) { return static_cast<double*>(p); };
      if (op == Step::sign) {
        sign_step_cpu(fill(SignStepArgs{}, host), 0, n);
        launched(sign_step_cuda(fill(SignStepArgs{}, device), stream_), op_name);
        return out.difference(ot);
      }
      if (op == Step::momentum) {
        const auto args = [&](auto data) {
          return MomentumStepArgs{fill(SignStepArgs{}, data), data(momentum.get()), doubles(data(&grad_sums)), 0.9};
        };
        momentum_sums_cpu(args(host), 0, chunks);
        momentum_step_cpu(args(host), 0, n);
        launched(momentum_step_cuda(args(device), stream_), op_name);
      } else {
        const auto args = [&](auto data) {
          L2StepArgs a = fill(L2StepArgs{}, data);
          a.grad_sums = doubles(data(&grad_sums));
          a.delta_sums = doubles(data(&delta_sums));
          return a;
        };
        if (grad) l2_grad_sums_cpu(args(host), 0, chunks);
        if (center) l2_delta_sums_cpu(args(host), 0, chunks);
        l2_step_cpu(args(host), 0, n);
        launched(l2_step_cuda(args(device), stream_), op_name);
      }
      for (const auto& [what, twin, dtype] :
           {std::tuple("grad sums: ", &grad_sums, Dtype::f64), std::tuple("delta sums: ", &delta_sums, Dtype::f64),
            std::tuple("momentum: ", momentum.get(), wide)}) {
        const std::string problem = twin->difference(dtype);
        if (!problem.empty()) return what + problem;
      }
      return out.difference(ot);
    });
  }

  void steps() {
    std::vector<Variant> variants(8);
    variants[0] = {"free"};
    variants[1] = {"free, step [N]"};
    variants[1].step_n = true;
    variants[2] = {"ball"};
    variants[2].ball = true;
    variants[3] = {"ball, step and eps [N]"};
    variants[3].ball = variants[3].step_n = variants[3].eps_n = true;
    variants[4] = {"ball, eps [N], inputs misaligned"};
    variants[4].ball = variants[4].eps_n = variants[4].misaligned_in = true;
    variants[5] = {"ball, out misaligned"};
    variants[5].ball = variants[5].misaligned_out = true;
    variants[6] = {"free, no box"};
    variants[6].lo = -kInf;
    variants[6].hi = kInf;
    variants[7] = {"ball, eps [N], in place"};
    variants[7].ball = variants[7].eps_n = variants[7].in_place = true;
    const Dtype f32 = Dtype::f32, f16 = Dtype::f16, bf16 = Dtype::bf16, f64 = Dtype::f64, u8 = Dtype::u8;
    for (Step op : {Step::sign, Step::momentum, Step::l2, Step::project})
      for (const Variant& v : variants) {
        if (op == Step::project && !v.ball) continue;
        step(op, f64, f64, f64, v);
        for (Dtype g : {f32, f16, bf16}) {
          for (Dtype t : {f32, f16, bf16, u8}) step(op, t, g, t, v);
          if (!v.in_place) {
            for (Dtype t : {f16, bf16, u8}) step(op, f32, g, t, v);
            step(op, u8, g, f32, v);
          }
          if (op == Step::project) break;  // it has no gradient whose dtype could vary
        }
      }
  }

  void random_step(Dtype dtype, Dtype ot, Noise noise, int64_t channels, const Variant& v) {
    const char* kinds[] = {"rademacher ", "uniform ", "truncated_normal ", "normal "};
    const std::string kind = kinds[int(noise)];
    const std::string layout = channels == 1 ? "contiguous" : "channels_last " + std::to_string(channels);
    const std::string name = "random_step " + kind + name_of(dtype) + " out " + name_of(ot) + " " + layout;
    over_shapes(name + ", " + v.name, [&](const Shape& s) {
      const int64_t spatial = std::max<int64_t>(1, s.inner / channels);
      const int64_t inner = spatial * channels, n = s.samples * inner;
      const TwinPtr x = random_values(dtype, n, -0.05, 1.05, v.misaligned_in, 1);
      const TwinPtr eps = v.eps_n ? random_sizes(dtype, s.samples, 5) : nullptr;
      const TwinPtr index = v.eps_n ? indices(s.samples) : nullptr;
      const TwinPtr key = key_of(0x123456789abcdef, 0x7edcba9876543210);
      const TwinPtr fresh =
          v.in_place ? nullptr : std::make_unique<Twin>(n * size_of(ot), v.misaligned_out ? size_of(ot) : 0);
      Twin& out = fresh ? *fresh : *x;
      RandomStepArgs args{host_in(x, dtype), {out.host(), ot}, host_ints(key), host_ints(index),
                          {eps ? eps->host() : nullptr, 8 / 255.}, noise, v.lo, v.hi, {n, inner},
                          {channels, spatial}};
      random_step_cpu(args, 0, n);
      args.x = device_in(x, dtype);
      args.out.data = out.device();
      args.key = device_ints(key);
      args.index = device_ints(index);
      args.eps.data = eps ? eps->device() : nullptr;
      launched(random_step_cuda(args, stream_), "random_step");
      return out.difference(ot);
    });
  }

  void random_steps() {
    std::vector<Variant> variants(4);
    variants[0] = {"one eps"};
    variants[1] = {"eps and index [N], in place"};
    variants[1].eps_n = variants[1].in_place = true;
    variants[2] = {"misaligned"};
    variants[2].misaligned_in = variants[2].misaligned_out = true;
    variants[3] = {"eps and index [N], no box"};
    variants[3].eps_n = true;
    variants[3].lo = -kInf;
    variants[3].hi = kInf;
    for (Noise noise : {Noise::rademacher, Noise::uniform, Noise::truncated_normal, Noise::normal})
      for (int64_t channels : {1, 2, 3, 5})
        for (const Variant& v : variants) {
          for (Dtype d : kAll) random_step(d, d, noise, channels, v);
          if (!v.in_place) random_step(Dtype::u8, Dtype::f32, noise, channels, v);
        }
  }

  // bias_act, and act_grad by its mask.
  void bias_act(Dtype dtype, const std::string& name, int64_t channels, bool last, bool residual, bool misaligned,
                bool in_place, Act act) {
    over_shapes(name, [&](const Shape& s) {
      const int64_t spatial = std::max<int64_t>(1, s.inner / channels), n = s.samples * channels * spatial;
      const Dtype wide = dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
      const TwinPtr x = random_values(dtype, n, -1, 1, misaligned, 1);
      const TwinPtr r = residual ? random_values(dtype, n, -1, 1, misaligned, 2) : nullptr;
      const TwinPtr bias = random_values(wide, channels, -1, 1, misaligned, 3);
      const TwinPtr grad = random_values(dtype, n, -1, 1, misaligned, 4);
      const TwinPtr fresh =
          in_place ? nullptr : std::make_unique<Twin>(n * size_of(dtype), misaligned ? size_of(dtype) : 0);
      Twin &out = fresh ? *fresh : *x, mask(mask_bytes(n), 0);
      const auto bits = [](char* p) { return reinterpret_cast<uint8_t*>(p); };
      BiasActArgs args{host_in(x, dtype), host_in(r, dtype),  bias->host(), {out.host(), dtype},
                       bits(mask.host()), n,  channels, last ? 1 : spatial, act, -0.1, 0.7, 0.01};
      bias_act_cpu(args, 0, mask_blocks(n));
      const bool sloping = act == Act::leaky_relu;
      act_grad_cpu({host_in(grad, dtype), bits(mask.host()), {grad->host(), dtype}, n, sloping, args.slope}, 0,
                   mask_blocks(n));
      args.x = device_in(x, dtype);
      args.residual = device_in(r, dtype);
      args.bias = bias->device();
      args.out.data = out.device();
      args.mask = bits(mask.device());
      launched(bias_act_cuda(args, stream_), "bias_act");
      launched(act_grad_cuda({device_in(grad, dtype), bits(mask.device()), {grad->device(), dtype}, n, sloping,
                              args.slope}, stream_), "act_grad");
      const std::string wrong_mask = mask.difference(Dtype::u8);
      if (!wrong_mask.empty()) return "mask: " + wrong_mask;
      const std::string wrong_grad = grad->difference(dtype);
      return wrong_grad.empty() ? out.difference(dtype) : "act_grad: " + wrong_grad;
    });
  }

  void bias_acts(Dtype dtype) {
    for (int64_t channels : {1, 3, 5, 8, 64})
      for (bool last : {false, true})
        for (bool residual : {false, true})
          for (const char* how : {"apart", "misaligned", "in place"})
            for (Act act : {Act::relu, Act::hardtanh, Act::leaky_relu}) {
              const char* of = act == Act::relu ? "" : act == Act::hardtanh ? ", clipped" : ", leaky";
              const std::string name = std::string("bias_act ") + name_of(dtype) + ", " + std::to_string(channels) +
                                       (last ? " channels last" : " channels") + (residual ? ", residual, " : ", ") +
                                       how + of;
              bias_act(dtype, name, channels, last, residual, how[0] == 'm', how[0] == 'i', act);
            }
  }

  void sample_epses() {
    const TwinPtr key = key_of(-1, 77);
    for (EpsDist dist : {EpsDist::fixed, EpsDist::uniform, EpsDist::truncated_normal})
      for (bool indexed : {false, true}) {
        std::string problem;
        int64_t unequal = 0, total = 0;
        for (int64_t n : {1, 255, 256, 257, 1000, 1000003}) {
          const TwinPtr index = indexed ? indices(n) : nullptr;
          Twin out(n * 4, 0);
          SampleEpsArgs args{reinterpret_cast<float*>(out.host()), n, host_ints(key), host_ints(index), dist,
                             16 / 255., 8 / 255., std::erf(std::sqrt(2.0))};
          sample_eps_cpu(args);
          args.out = reinterpret_cast<float*>(out.device());
          args.key = device_ints(key);
          args.index = device_ints(index);
          launched(sample_eps_cuda(args, stream_), "sample_eps");
          // The two sides' log() may differ in the last place of a double: in the float, one spacing at most.
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
        tally_.note(std::string("sample_eps ") +
                        (dist == EpsDist::fixed     ? "fixed"
                         : dist == EpsDist::uniform ? "uniform"
                                                    : "truncated_normal") +
                        (indexed ? ", index" : ""),
                    problem);
      }
  }

  void split_keys() {
    const TwinPtr key = key_of(INT64_MIN, INT64_MAX);
    std::string problem;
    for (int64_t n : {1, 2, 255, 256, 257, 300007}) {
      Twin out(n * 16, 0);
      split_key_cpu({host_ints(key), reinterpret_cast<int64_t*>(out.host()), n});
      launched(split_key_cuda({device_ints(key), reinterpret_cast<int64_t*>(out.device()), n}, stream_), "split_key");
      const std::vector<char> got = out.download();
      if (memcmp(got.data(), out.host(), got.size())) problem = "n = " + std::to_string(n);
    }
    tally_.note("split_key", problem);
  }

  // Elements beyond 2^32: the same bytes everywhere, and the CPU computes windows of them only.
  void far_offsets() {
    constexpr int64_t inner = (int64_t(1) << 31) + 4;
    static_assert(inner % 3 == 0);
    const int64_t n = 2 * inner, bytes = 2 * n;
    size_t free = 0, total = 0;
    MUST(cudaMemGetInfo(&free, &total));
    if (free < size_t(bytes) + (size_t(1) << 30)) {
      printf("skipped far offsets: %.1f GiB of GPU memory wanted\n", double(bytes) / (1 << 30) + 1);
      return;
    }
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* lazy = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (lazy == MAP_FAILED) {
      printf("skipped far offsets: no address space on the host\n");
      return;
    }
    char *host = static_cast<char*>(lazy), *device = nullptr;
    MUST(cudaMalloc(reinterpret_cast<void**>(&device), size_t(bytes)));
    const TwinPtr key = key_of(5, 6);
    const TwinPtr sizes = random_values(Dtype::f32, 2, 0.01, 0.02, false, 8);
    reinterpret_cast<float*>(sizes->host())[0] = 0.01f;
    reinterpret_cast<float*>(sizes->host())[1] = 0.02f;
    sizes->upload();
    constexpr int kByte = 0x3e, kWindow = 5000;  // bfloat16 0x3e3e, 0.186

    const auto compare = [&](const char* name, const std::function<void(int64_t, int64_t)>& cpu,
                             const std::function<int()>& cuda) {
      MUST(cudaMemset(device, kByte, size_t(bytes)));
      MUST(cudaDeviceSynchronize());
      launched(cuda(), name);
      std::string problem;
      std::vector<char> got(2 * kWindow);
      for (int64_t middle : {int64_t(kWindow / 2), inner, int64_t(1) << 32, n - kWindow / 2}) {
        const int64_t begin = std::min(middle - kWindow / 2, n - kWindow);
        memset(host + 2 * begin, kByte, got.size());
        cpu(begin, begin + kWindow);
        MUST(cudaMemcpy(got.data(), device + 2 * begin, got.size(), cudaMemcpyDeviceToHost));
        if (memcmp(got.data(), host + 2 * begin, got.size())) problem = "near element " + std::to_string(middle);
      }
      tally_.note(name, problem);
    };

    const Dtype t = Dtype::bf16;
    SignStepArgs sh{{host, t}, {host, t}, {}, {host, t}, {sizes->host()}, {}, 0, 1, {n, inner}};
    SignStepArgs sd{{device, t}, {device, t}, {}, {device, t}, {sizes->device()}, {}, 0, 1, {n, inner}};
    compare("sign_step beyond 2^32 elements", [&](int64_t b, int64_t e) { sign_step_cpu(sh, b, e); },
            [&] { return sign_step_cuda(sd, stream_); });
    for (int64_t channels : {1, 3}) {
      RandomStepArgs rh{{host, t}, {host, t}, host_ints(key), nullptr, {sizes->host()}, Noise::rademacher, 0, 1,
                        {n, inner}, {channels, inner / channels}};
      RandomStepArgs rd = rh;
      rd.x.data = rd.out.data = device;
      rd.key = device_ints(key);
      rd.eps.data = sizes->device();
      compare("random_step beyond 2^32 elements", [&](int64_t b, int64_t e) { random_step_cpu(rh, b, e); },
              [&] { return random_step_cuda(rd, stream_); });
    }
    MUST(cudaFree(device));
    munmap(lazy, size_t(bytes));
  }

  void conversions();
  void philox_words();
  void quantile();
  void model_entries();
  void logit_grads();
  std::string logit_grad(Dtype dtype, int64_t members, int32_t classes, Fuse fuse, Loss loss, Rule rule);
  void ensemble_linears();
  struct Product {
    int64_t members;
    int32_t batch, cols, inner;
  };
  std::string ensemble_linear(Dtype dtype, const Product& s, int bits, bool misaligned);
  std::string ensemble_linear_act(Dtype dtype, int bits, int32_t cols);

  Tally tally_;
  cudaStream_t stream_ = nullptr;
};

// The device's own conversion instructions against the host's arithmetic.
template <class T>
__global__ void widen_kernel(float* out) {
  T t{};
  t.bits = uint16_t(blockIdx.x * blockDim.x + threadIdx.x);
  out[t.bits] = to_compute(t);
}
template <class T>
__global__ void round_kernel(const float* v, uint16_t* out, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = uint16_t(round_bits(v[i], T{}));
}
__global__ void philox_kernel(uint32_t* out, uint32_t word) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  const Words w = philox(i, word, ~i, word, word ^ i, word);
  for (int k = 0; k < 4; ++k) out[4 * i + k] = w.w[k];
}
__global__ void quantile_kernel(double* out, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = normal_quantile((i + 0.5) / n);
}

void Selftest::conversions() {
  const auto both = [&](auto t) {
    using T = decltype(t);
    const Dtype dtype = Traits<T>::dtype;
    Twin wide(65536 * 4, 0);
    std::vector<float> values;
    for (uint32_t p = 0; p < 65536; ++p) {
      T x{uint16_t(p)};
      const float v = to_compute(x);
      reinterpret_cast<float*>(wide.host())[p] = v;
      // Each number, the point halfway to the next, and that point's neighbours.
      const T next{uint16_t(p + 1)};
      const float middle = float(0.5 * (double(v) + double(to_compute(next))));
      for (float f : {v, middle, std::nextafter(middle, kInf), std::nextafter(middle, -kInf)}) values.push_back(f);
    }
    for (uint32_t i = 0; i < (1u << 22); ++i) values.push_back(bits_float(i * 1021u));
    widen_kernel<T><<<256, 256, 0, stream_>>>(reinterpret_cast<float*>(wide.device()));
    launched(int(cudaGetLastError()), "widen");
    tally_.note(std::string(name_of(dtype)) + " to float32", wide.difference(Dtype::f32));

    const int n = int(values.size());
    Twin in(int64_t(n) * 4, 0), out(int64_t(n) * 2, 0);
    memcpy(in.host(), values.data(), values.size() * 4);
    in.upload();
    for (int i = 0; i < n; ++i)
      reinterpret_cast<uint16_t*>(out.host())[i] = uint16_t(round_bits(values[size_t(i)], T{}));
    round_kernel<T><<<(n + 255) / 256, 256, 0, stream_>>>(reinterpret_cast<const float*>(in.device()),
                                                         reinterpret_cast<uint16_t*>(out.device()), n);
    launched(int(cudaGetLastError()), "round");
    tally_.note(std::string("float32 to ") + name_of(dtype), out.difference(dtype));
  };
  both(half_t());
  both(bfloat_t());
}

void Selftest::philox_words() {
  constexpr int n = 65536;
  Twin out(n * 16, 0);
  constexpr uint32_t kWord = 0xdeadbeefu;
  for (uint32_t i = 0; i < n; ++i) {
    const Words w = philox(i, kWord, ~i, kWord, kWord ^ i, kWord);
    memcpy(out.host() + 16 * i, w.w, 16);
  }
  philox_kernel<<<n / 256, 256, 0, stream_>>>(reinterpret_cast<uint32_t*>(out.device()), kWord);
  launched(int(cudaGetLastError()), "philox");
  const std::vector<char> got = out.download();
  tally_.note("philox", memcmp(got.data(), out.host(), got.size()) ? "words differ" : "");
}

void Selftest::quantile() {
  constexpr int n = 1 << 20;
  Twin out(n * 8, 0);
  quantile_kernel<<<(n + 255) / 256, 256, 0, stream_>>>(reinterpret_cast<double*>(out.device()), n);
  launched(int(cudaGetLastError()), "normal_quantile");
  const std::vector<char> got = out.download();
  double worst = 0.0;
  for (int i = 0; i < n; ++i) {
    double a;
    memcpy(&a, got.data() + 8 * i, 8);
    const double b = normal_quantile((i + 0.5) / n);
    worst = std::max(worst, std::abs(a - b) / std::abs(b));
  }
  char text[64];
  snprintf(text, sizeof text, "relative difference %.2g", worst);
  tally_.note("normal_quantile", worst < 1e-15 ? "" : text);
}

void Selftest::model_entries() {
  struct Case {
    int64_t batch, channels, spatial;
  };
  const Case cases[] = {{2, 1, 784}, {3, 3, 7},     {1, 3, 8},  {2, 3, 143},
                        {33, 3, 64}, {5, 3, 1024}, {2, 5, 64}, {3, 2, 11}};
  const auto last = [](int bits, int bit) { return bool(bits >> bit & 1); };
  for (Dtype xt : kAll)
    for (Dtype ot : {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64})
      for (bool misaligned : {false, true}) {
        std::string problem;
        for (const Case& c : cases)
          for (int bits = 0; bits < 64 && problem.empty(); ++bits) {  // layouts, delta, clamp, direction
            const bool wide = xt == Dtype::f64, delta = last(bits, 3), clamp = last(bits, 4), backward = last(bits, 5);
            const int64_t n = c.batch * c.channels * c.spatial;
            const Dtype dt = wide ? Dtype::f64 : Dtype::bf16, gt = wide ? Dtype::f64 : Dtype::f16;
            const Dtype st = wide ? Dtype::f64 : Dtype::f32;
            const TwinPtr x = random_values(xt, n, -0.2, 1.2, misaligned, 1);
            const TwinPtr d = random_values(dt, n, -0.3, 0.3, misaligned, 2);
            const TwinPtr g = random_values(gt, n, -1, 1, misaligned, 3);
            const TwinPtr mean = random_values(st, c.channels, 0.3, 0.6, false, 4, false);
            const TwinPtr std = random_values(st, c.channels, 0.2, 0.4, false, 5, false);
            Twin out(n * size_of(ot), misaligned ? size_of(ot) : 0);
            ModelEntryArgs host, device;
            for (ModelEntryArgs* a : {&host, &device}) {
              const auto in = a == &host ? host_in : device_in;
              const bool image = !backward || clamp;
              a->x = {image ? in(x, xt) : In{}, backward ? last(bits, 2) : last(bits, 0)};
              a->delta = {image && delta ? in(d, dt) : In{}, last(bits, 1)};
              a->grad = {backward ? in(g, gt) : In{}, last(bits, 0)};
              a->out = {a == &host ? out.host() : out.device(), ot};
              a->out_channels_last = last(bits, 2);
              a->wide = wide;
              a->mean = in(mean, st).data;
              a->std = in(std, st).data;
              a->clamp = clamp;
              a->batch = c.batch;
              a->channels = c.channels;
              a->spatial = c.spatial;
            }
            (backward ? model_entry_grad_cpu : model_entry_cpu)(host, 0, c.batch * c.spatial);
            launched((backward ? model_entry_grad_cuda : model_entry_cuda)(device, stream_), "model_entry");
            problem = out.difference(ot);
            if (!problem.empty())
              problem = "channels " + std::to_string(c.channels) + ", spatial " + std::to_string(c.spatial) +
                        ", mode " + std::to_string(bits) + " " + problem;
          }
        const std::string name = std::string("model_entry ") + name_of(xt) + " to " + name_of(ot);
        tally_.note(name + (misaligned ? " misaligned" : ""), problem);
      }
}

// As doubles, whatever they are.
std::vector<double> numbers(const char* data, Dtype dtype, int64_t n) {
  std::vector<double> result;
  for (int64_t i = 0; i < n; ++i) {
    switch (dtype) {
      case Dtype::f32: result.push_back(reinterpret_cast<const float*>(data)[i]); break;
      case Dtype::f16: result.push_back(to_compute(reinterpret_cast<const half_t*>(data)[i])); break;
      case Dtype::bf16: result.push_back(to_compute(reinterpret_cast<const bfloat_t*>(data)[i])); break;
      default: result.push_back(reinterpret_cast<const double*>(data)[i]); break;
    }
  }
  return result;
}

// Sums run in another order on the GPU: labels are equal, the rest is close. Where rounding moved a scale to the
// next power of two, the gradient moved with it.
std::string Selftest::logit_grad(Dtype dtype, int64_t members, int32_t classes, Fuse fuse, Loss loss, Rule rule) {
  constexpr int64_t batch = 6;
  const Dtype wide = dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  const int64_t n = members * batch * classes;
  std::vector<double> values;
  std::minstd_rand random{uint32_t(classes)};
  for (int64_t i = 0; i < n; ++i) values.push_back(double(random() % 2001) / 100 - 10);
  values[size_t(n - 1)] = kNan;  // in the last sample
  Twin z(n * size_of(dtype), 0), grad(n * size_of(dtype), 0), labels(batch * 8, 0), given(batch * 8, 0);
  Twin losses(batch * size_of(wide), 0), scales(batch * size_of(wide), 0);
  for (int64_t i = 0; i < n; ++i) {
    switch (dtype) {
      case Dtype::f32: reinterpret_cast<float*>(z.host())[i] = float(values[size_t(i)]); break;
      case Dtype::f16: reinterpret_cast<half_t*>(z.host())[i] = narrow<half_t>(values[size_t(i)]); break;
      case Dtype::bf16: reinterpret_cast<bfloat_t*>(z.host())[i] = narrow<bfloat_t>(values[size_t(i)]); break;
      default: reinterpret_cast<double*>(z.host())[i] = values[size_t(i)]; break;
    }
  }
  z.upload();
  for (int64_t b = 0; b < batch; ++b) reinterpret_cast<int64_t*>(given.host())[b] = b == 1 ? -1 : 7919 * b % classes;
  given.upload();
  const TwinPtr key = key_of(11, 12);
  LogitGradArgs host, device;
  for (LogitGradArgs* a : {&host, &device}) {
    const auto data = [&](Twin& t) { return a == &host ? t.host() : t.device(); };
    a->logits = {data(z), dtype};
    a->grad = {data(grad), dtype};
    a->given = reinterpret_cast<const int64_t*>(data(given));
    a->labels = reinterpret_cast<int64_t*>(data(labels));
    a->losses = data(losses);
    a->scales = data(scales);
    a->key = a == &host ? host_ints(key) : device_ints(key);
    a->members = members;
    a->batch = batch;
    a->classes = classes;
    a->rule = rule;
    a->loss = loss;
    a->fuse = fuse;
    a->kappa = 1.0;
  }
  logit_grad_cpu(host, 0, batch);
  launched(logit_grad_cuda(device, stream_), "logit_grad");
  const std::vector<char> got = labels.download();
  if (memcmp(got.data(), labels.host(), got.size())) return "labels differ";
  const auto both = [&](Twin& t, Dtype d, int64_t count) {
    return std::pair(numbers(t.host(), d, count), numbers(t.download().data(), d, count));
  };
  const auto [scale, scale_gpu] = both(scales, wide, batch);
  const auto [value, value_gpu] = both(losses, wide, batch);
  const auto [g, g_gpu] = both(grad, dtype, n);
  const double eps = dtype == Dtype::f16 ? 0x1p-10 : dtype == Dtype::bf16 ? 0x1p-7 : 0.0;
  for (int64_t b = 0; b < batch; ++b) {
    const double moved = scale_gpu[size_t(b)] / scale[size_t(b)];
    if (moved != 1.0 && moved != 0.5 && moved != 2.0) return "scale of sample " + std::to_string(b);
    const double a = value[size_t(b)], c = value_gpu[size_t(b)];
    if (std::isnan(a) != std::isnan(c) || std::abs(a - c) > 1e-4 + 1e-5 * std::abs(a))
      return "loss of sample " + std::to_string(b) + ": CUDA " + std::to_string(c) + ", CPU " + std::to_string(a);
    for (int64_t k = 0; k < members; ++k) {
      const size_t first = size_t((k * batch + b) * classes);
      double largest = 0.0;
      for (int32_t j = 0; j < classes; ++j) largest = std::fmax(largest, std::abs(g[first + j]));
      for (int32_t j = 0; j < classes; ++j) {
        const double p = g[first + j] * moved, q = g_gpu[first + j];
        if (std::isnan(p) != std::isnan(q) || std::abs(p - q) > (eps + 1e-5) * std::fmax(moved, 1.0) * largest)
          return "gradient of sample " + std::to_string(b) + ", class " + std::to_string(j) + ": CUDA " +
                 std::to_string(q) + ", CPU " + std::to_string(p);
      }
    }
  }
  return "";
}

void Selftest::logit_grads() {
  for (Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64})
    for (int64_t members : {1, 3, 5})
      for (Fuse fuse : {Fuse::logits, Fuse::probs, Fuse::loss})
        for (Loss loss : {Loss::ce, Loss::cw, Loss::dlr}) {
          std::string problem;
          for (int32_t classes : {3, 10, 33, 1000, 1001, 2048, 12000, 30000, 70000})
            for (Rule rule : {Rule::given, Rule::random, Rule::predicted, Rule::least_likely})
              // Among many mixed probabilities two may lie within a rounding error of each other.
              if (problem.empty() && (rule == Rule::given || fuse == Fuse::logits || classes < 99)) {
                problem = logit_grad(dtype, members, classes, fuse, loss, rule);
                if (!problem.empty()) problem = std::to_string(classes) + " classes: " + problem;
              }
          tally_.note(std::string("logit_grad ") + name_of(dtype) + ", " + std::to_string(members) +
                          " members, fuse " + std::to_string(int(fuse)) + ", loss " + std::to_string(int(loss)),
                      problem);
        }
}

// Small integers: their sums are exact in float32, and so the same in any order.
TwinPtr integers(Dtype dtype, int64_t n, bool misaligned, uint32_t seed) {
  auto twin = std::make_unique<Twin>(n * size_of(dtype), misaligned ? size_of(dtype) : 0);
  std::minstd_rand random(seed);
  for (int64_t i = 0; i < n; ++i) {
    const double v = double(random() / 16 % 7) - 3.0;
    switch (dtype) {
      case Dtype::f32: reinterpret_cast<float*>(twin->host())[i] = float(v); break;
      case Dtype::f16: reinterpret_cast<half_t*>(twin->host())[i] = narrow<half_t>(v); break;
      default: reinterpret_cast<bfloat_t*>(twin->host())[i] = narrow<bfloat_t>(v); break;
    }
  }
  twin->upload();
  return twin;
}
TwinPtr random_bytes(int64_t n, uint32_t seed) {
  auto twin = std::make_unique<Twin>(n, 0);
  std::minstd_rand random(seed);
  for (int64_t i = 0; i < n; ++i) twin->host()[i] = char(random() / 16);
  twin->upload();
  return twin;
}
uint8_t* bytes(Twin& t, bool host) { return reinterpret_cast<uint8_t*>(host ? t.host() : t.device()); }

// Bits: inner_first; then of the forward product shared, bias, act, of the backward one keep, reduce.
std::string Selftest::ensemble_linear(Dtype dtype, const Product& s, int bits, bool misaligned) {
  const auto bit = [&](int i) { return bool(bits >> i & 1); };
  const bool inner_first = bit(0), shared = !inner_first && bit(1), bias = !inner_first && bit(2), act = !inner_first && bit(3);
  const bool keep = inner_first && bit(1), reduce = inner_first && bit(2);
  const int64_t rows = s.members * s.batch, out_rows = reduce ? s.batch : rows;
  const TwinPtr a = integers(dtype, (shared ? s.batch : rows) * s.inner, misaligned, 1);
  const TwinPtr b = integers(dtype, s.members * s.cols * s.inner, misaligned, 2);
  const TwinPtr c = integers(dtype, s.members * s.cols, misaligned, 3);
  const TwinPtr kept = random_bytes(rows * mask_bytes(s.inner), 4);
  Twin out(out_rows * s.cols * size_of(dtype), misaligned ? size_of(dtype) : 0), mask(out_rows * mask_bytes(s.cols), 0);
  LinearArgs host, device;
  for (LinearArgs* args : {&host, &device}) {
    const bool here = args == &host;
    const auto in = here ? host_in : device_in;
    args->a = in(a, dtype);
    args->b = in(b, dtype);
    if (bias) args->bias = in(c, dtype);
    args->out = {here ? out.host() : out.device(), dtype};
    if (act) args->mask = bytes(mask, here);
    if (keep) args->keep = bytes(*kept, here);
    args->members = s.members;
    args->batch = s.batch;
    args->cols = s.cols;
    args->inner = s.inner;
    args->shared = shared;
    args->inner_first = inner_first;
    args->reduce = reduce;
  }
  ensemble_linear_cpu(host, 0, linear_blocks(host));
  launched(ensemble_linear_cuda(device, stream_), "ensemble_linear");
  const std::string problem = out.difference(dtype);
  return problem.empty() && act ? mask.difference(Dtype::u8) : problem;
}

std::string Selftest::ensemble_linear_act(Dtype dtype, int bits, int32_t cols) {
  const auto bit = [&](int i) { return bool(bits >> i & 1); };
  constexpr int64_t members = 2, rows = 6;
  const TwinPtr a = random_values(dtype, rows * cols, -1, 1, bit(0), 1);
  const TwinPtr bias = random_values(dtype, members * cols, -1, 1, bit(0), 2);
  const TwinPtr out = random_values(dtype, rows * cols, -1, 1, bit(0), 3);
  const TwinPtr kept = random_bytes(rows * mask_bytes(cols), 4);
  Twin mask(rows * mask_bytes(cols), 0);
  LinearActArgs host, device;
  for (LinearActArgs* args : {&host, &device}) {
    const bool here = args == &host;
    const auto in = here ? host_in : device_in;
    args->out = {here ? out->host() : out->device(), dtype};
    args->rows = rows;
    args->batch = rows / members;
    args->cols = cols;
    if (bit(1)) args->bias = in(bias, dtype);
    if (bit(2)) args->mask = bytes(mask, here);
    if (bit(3)) {
      args->a = in(a, dtype);
      args->keep = bytes(*kept, here);
    }
  }
  ensemble_linear_act_cpu(host, 0, rows);
  launched(ensemble_linear_act_cuda(device, stream_), "ensemble_linear_act");
  const std::string problem = out->difference(dtype);
  return problem.empty() && bit(2) ? mask.difference(Dtype::u8) : problem;
}

void Selftest::ensemble_linears() {
  // Less than a tile, and rows that allow copies of 16, 8, 4 and 2 bytes; several tiles, whole and cut; as many as
  // large tiles are used for.
  const Product products[] = {{1, 1, 1, 1},       {2, 3, 10, 7},       {3, 65, 66, 130},    {2, 64, 64, 64},
                              {2, 70, 300, 300},  {3, 130, 129, 1001}, {2, 256, 1000, 784}, {8, 256, 2048, 300},
                              {4, 600, 2047, 33}, {2, 5, 20, 0}};
  for (Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
    for (int bits = 0; bits < 16; ++bits) {
      if (bits & 1 && bits & 8) continue;
      std::string problem;
      for (const Product& s : products)
        for (bool misaligned : {false, true}) {
          if (!problem.empty()) break;
          problem = ensemble_linear(dtype, s, bits, misaligned);
          if (!problem.empty())
            problem = std::to_string(s.members) + " x " + std::to_string(s.batch) + " x " + std::to_string(s.cols) +
                      " x " + std::to_string(s.inner) + (misaligned ? " misaligned: " : ": ") + problem;
        }
      tally_.note(std::string("ensemble_linear ") + name_of(dtype) + ", mode " + std::to_string(bits), problem);
    }
    std::string problem;
    for (int bits = 0; bits < 16; ++bits)  // from 8 on with `keep`, which goes with nothing else
      for (int32_t cols : {1, 8, 20, 300, 1000, 1001})
        if (problem.empty() && bits < 10) problem = ensemble_linear_act(dtype, bits, cols);
    tally_.note(std::string("ensemble_linear_act ") + name_of(dtype), problem);
  }
}

}  // namespace
}  // namespace ensadv

int main() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    printf("no usable GPU: %s\n", error == cudaSuccess ? "none found" : ensadv::cuda_error_text(int(error)));
    return 77;
  }
  cudaDeviceProp device;
  ensadv::must(int(cudaGetDeviceProperties(&device, 0)), "cudaGetDeviceProperties");
  printf("%s, sm_%d%d\n", device.name, device.major, device.minor);
  return ensadv::Selftest().run();
}
