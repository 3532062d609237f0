// From numpy arrays to what layer 1's launchers take.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../kernels/tensor_ref.h"

namespace ensadv {

namespace py = pybind11;

template <class T>
using Dense = py::array_t<T, py::array::c_style>;

inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

inline Dtype dtype_named(const std::string& name) {
  if (name == "float32") return Dtype::f32;
  if (name == "float64") return Dtype::f64;
  if (name == "float16") return Dtype::f16;
  if (name == "bfloat16") return Dtype::bf16;
  if (name == "uint8") return Dtype::u8;
  throw std::invalid_argument("dtype must be float32, float64, float16, bfloat16 or uint8");
}

// A numpy array read as `dtype`; 16-bit types come as uint16. The memory stays the caller's, at any alignment.
struct Array {
  Array(py::array array, const std::string& dtype) : memory(std::move(array)), dtype(dtype_named(dtype)) {
    require(memory.itemsize() == size_of(this->dtype), "the array's item size does not fit its dtype");
    require(memory.flags() & py::array::c_style, "the array must be contiguous");
  }
  int64_t size() const { return memory.size(); }
  In in() const { return {memory.data(), dtype}; }
  Out out() { return {memory.mutable_data(), dtype}; }

  py::array memory;
  Dtype dtype;
};

inline const int64_t* key_data(const Dense<int64_t>& key) {
  require(key.size() == 2, "key must hold two numbers");
  return key.data();
}

inline const int64_t* index_data(const std::optional<Dense<int64_t>>& index, int64_t n) {
  require(!index || index->size() == n, "one index per sample is wanted");
  return index ? index->data() : nullptr;
}

// The range [begin, end) of a launcher, run in `threads` pieces at once, as torch's parallel_for does.
struct Range {
  int64_t begin = 0;
  std::optional<int64_t> end;
  int threads = 1;
};

template <class Launch>
void run(const Range& range, int64_t numel, Launch launch) {
  const int64_t begin = range.begin, end = range.end.value_or(numel);
  require(0 <= begin && begin <= end && end <= numel && range.threads > 0, "no such range");
  const py::gil_scoped_release release;
  if (range.threads == 1) return launch(begin, end);
  const int64_t piece = (end - begin + range.threads - 1) / range.threads;
  std::vector<std::thread> threads;
  for (int64_t from = begin; from < end; from += piece)
    threads.emplace_back([=] { launch(from, std::min(from + piece, end)); });
  for (std::thread& t : threads) t.join();
}

// Each in a file of its own.
void bind_bias_act(py::module_& m);
void bind_ensemble_linear(py::module_& m);
void bind_logit_grad(py::module_& m);
void bind_matrix_tile(py::module_& m);
void bind_model_entry(py::module_& m);

}  // namespace ensadv
