// What the cases share: their tally, the stream that they launch on, and the shapes that most of them run over.
#pragma once

#include <functional>

#include "twin.h"

namespace ensadv::selftest {

constexpr Dtype kAll[] = {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64, Dtype::u8};
constexpr Dtype kFloats[] = {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64};

struct Shape {
  int64_t samples, inner;
};
// Samples shorter than a pack, with odd ends, of whole packs, one element more and one less. The last shape takes more
// than one pass of the largest grid.
constexpr Shape kShapes[] = {{1, 1},   {9, 1},    {5, 3},    {1, 7},    {4, 8},     {3, 9},      {2, 16},     {7, 31},
                         {4, 257}, {3, 1023}, {2, 2048}, {2, 3072}, {1, 65537}, {3, 20000}, {3, 900001}};

// How the arguments of a step vary. _n: one size per sample.
struct Variant {
  const char* name;
  bool ball = false, step_n = false, eps_n = false, misaligned_in = false, misaligned_out = false, in_place = false;
  double lo = 0.0, hi = 1.0;

  // The result's own memory; null in place.
  TwinPtr fresh_out(int64_t n, Dtype dtype) const {
    const int64_t size = size_of(dtype);
    return in_place ? nullptr : std::make_unique<Twin>(n * size, misaligned_out ? size : 0);
  }
};

class Harness {
 public:
  Harness() { MUST(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Harness() { cudaStreamDestroy(stream_); }
  Harness(const Harness&) = delete;

  cudaStream_t stream() const { return stream_; }
  int passed() const { return passed_; }
  int failed() const { return failed_; }

  // `problem` is empty where the case holds.
  void note(const std::string& name, const std::string& problem) {
    ++(problem.empty() ? passed_ : failed_);
    printf("%s %s%s%s\n", problem.empty() ? "ok    " : "FAILED", name.c_str(), problem.empty() ? "" : ": ",
           problem.c_str());
    fflush(stdout);
  }

  // `error` is what a launch returned. Waits for its end.
  void must_finish(int error, const char* what) const {
    must(error, what);
    must(int(cudaStreamSynchronize(stream_)), what);
  }

  // One case over all shapes; `body` returns the problem with a shape, or "".
  void over_shapes(const std::string& name, const std::function<std::string(const Shape&)>& body) {
    std::string problem;
    for (const Shape& shape : kShapes) {
      problem = body(shape);
      if (problem.empty()) continue;
      problem = "shape [" + std::to_string(shape.samples) + ", " + std::to_string(shape.inner) + "] " + problem;
      break;
    }
    note(name, problem);
  }

 private:
  cudaStream_t stream_ = nullptr;
  int passed_ = 0, failed_ = 0;
};

// One function per file.
void check_numbers(Harness& harness);
void check_keys(Harness& harness);
void check_steps(Harness& harness);
void check_random_steps(Harness& harness);
void check_activations(Harness& harness);
void check_model_entries(Harness& harness);
void check_logit_grads(Harness& harness);
void check_ensemble_linears(Harness& harness);
void check_far_offsets(Harness& harness);

}  // namespace ensadv::selftest
