// ensadv_kernels: layer 1 on numpy arrays, for tests without torch and under sanitizers. It passes arguments to the
// launchers as they are, and checks only sizes.
#include <cmath>
#include <variant>

#include "../kernels/cpu/loop.h"
#include "../kernels/l2_step.h"
#include "../kernels/momentum_step.h"
#include "../kernels/null.h"
#include "../kernels/random_step.h"
#include "../kernels/sample_eps.h"
#include "../kernels/sign_step.h"
#include "../kernels/split_key.h"
#include "arrays.h"

using namespace ensadv;

namespace {

using Size = std::variant<double, py::array>;  // one number, or one per sample

Noise noise_named(const std::string& name) {
  if (name == "rademacher") return Noise::rademacher;
  if (name == "uniform") return Noise::uniform;
  if (name == "truncated_normal") return Noise::truncated_normal;
  if (name == "normal") return Noise::normal;
  throw std::invalid_argument("kind must be rademacher, uniform, truncated_normal or normal");
}

PerSample per_sample(const Size& size, Dtype dtype, const Batch& batch) {
  if (const double* value = std::get_if<double>(&size)) return {nullptr, *value};
  const py::array& array = std::get<py::array>(size);
  require(array.size() * batch.inner == batch.numel, "one size per sample is wanted");
  require(array.itemsize() == (dtype == Dtype::f64 ? 8 : 4), "sizes must hold the compute type");
  return {array.data(), 0.0};
}

Batch batch_of(const Array& x, const Array& out, int64_t inner) {
  require(out.size() == x.size(), "all arrays must have one size");
  require(inner > 0 && x.size() % inner == 0, "the batch must hold whole samples");
  return {x.size(), inner};
}

void null(const Array& x, Array& out, const Range& range) {
  const NullArgs args{x.in(), out.out(), batch_of(x, out, 1)};
  require(x.dtype == out.dtype, "out must have x's dtype");
  run(range, x.size(), [&](int64_t begin, int64_t end) { null_cpu(args, begin, end); });
}

// The arguments that the steps share. `grad` may be absent if the op allows it.
template <class Args>
Args step_args(const Array& x, const Array* grad, Array& out, const Size& step, const Array* center, const Size& eps,
               double lo, double hi, int64_t inner) {
  Args args;
  args.batch = batch_of(x, out, inner);
  require((!grad || grad->size() == x.size()) && (!center || center->size() == x.size()),
          "all arrays must have one size");
  args.x = x.in();
  args.grad = grad ? grad->in() : In{};
  args.center = center ? center->in() : In{};
  args.out = out.out();
  args.step = per_sample(step, out.dtype, args.batch);
  args.eps = per_sample(eps, out.dtype, args.batch);
  args.lo = lo;
  args.hi = hi;
  return args;
}

void sign_step(const Array& x, const Array& grad, Array& out, const Size& step, const Array* center, const Size& eps,
               double lo, double hi, int64_t inner, const Range& range) {
  const auto args = step_args<SignStepArgs>(x, &grad, out, step, center, eps, lo, hi, inner);
  run(range, x.size(), [&](int64_t begin, int64_t end) { sign_step_cpu(args, begin, end); });
}

void momentum_step(const Array& x, const Array& grad, Array& momentum, Array& out, const Size& step, double decay,
                   const Array* center, const Size& eps, double lo, double hi, int64_t inner, const Range& range) {
  require(momentum.size() == x.size(), "all arrays must have one size");
  require(momentum.dtype == (out.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32), "momentum holds the compute type");
  const auto along = step_args<SignStepArgs>(x, &grad, out, step, center, eps, lo, hi, inner);
  const int64_t chunks = x.size() / inner * chunks_of(inner).count;
  std::vector<double> sums(size_t(chunks), NAN);
  const MomentumStepArgs args{along, momentum.out().data, sums.data(), decay};
  run({0, {}, range.threads}, chunks, [&](int64_t begin, int64_t end) { momentum_sums_cpu(args, begin, end); });
  run(range, x.size(), [&](int64_t begin, int64_t end) { momentum_step_cpu(args, begin, end); });
}

void l2_step(const Array& x, const Array* grad, Array& out, const Size& step, const Array* center, const Size& eps,
             double lo, double hi, int64_t inner, const Range& range) {
  auto args = step_args<L2StepArgs>(x, grad, out, step, center, eps, lo, hi, inner);
  const int64_t chunks = x.size() / inner * chunks_of(inner).count;
  std::vector<double> grad_sums(size_t(chunks), NAN), delta_sums(size_t(chunks), NAN);
  args.grad_sums = grad_sums.data();
  args.delta_sums = delta_sums.data();
  const Range all{0, {}, range.threads};
  if (grad) run(all, chunks, [&](int64_t begin, int64_t end) { l2_grad_sums_cpu(args, begin, end); });
  if (center) run(all, chunks, [&](int64_t begin, int64_t end) { l2_delta_sums_cpu(args, begin, end); });
  run(range, x.size(), [&](int64_t begin, int64_t end) { l2_step_cpu(args, begin, end); });
}

void random_step(const Array& x, Array& out, const Dense<int64_t>& key, const Size& eps, const std::string& kind,
                 const std::optional<Dense<int64_t>>& index, double lo, double hi, int64_t inner, int64_t channels,
                 const Range& range) {
  const Batch batch = batch_of(x, out, inner);
  require(channels > 0 && channels <= kMaxChannelsLast && inner % channels == 0, "no such channels");
  const RandomStepArgs args{x.in(), out.out(), key_data(key), index_data(index, batch.numel / inner),
                            per_sample(eps, out.dtype, batch), noise_named(kind), lo, hi, batch,
                            {channels, inner / channels}};
  run(range, x.size(), [&](int64_t begin, int64_t end) { random_step_cpu(args, begin, end); });
}

void sample_eps(Dense<float>& out, const Dense<int64_t>& key, const std::string& dist, double eps_max, double sigma,
                const std::optional<Dense<int64_t>>& index) {
  require(dist == "fixed" || dist == "uniform" || dist == "truncated_normal", "no such distribution");
  const EpsDist kind = dist == "fixed"     ? EpsDist::fixed
                       : dist == "uniform" ? EpsDist::uniform
                                           : EpsDist::truncated_normal;
  sample_eps_cpu({out.mutable_data(), out.size(), key_data(key), index_data(index, out.size()), kind, eps_max, sigma,
                  std::erf(eps_max / (sigma * std::sqrt(2.0)))});
}

void split_key(const Dense<int64_t>& key, Dense<int64_t>& out) {
  require(out.size() % 2 == 0, "out must hold pairs");
  split_key_cpu({key_data(key), out.mutable_data(), out.size() / 2});
}

Dense<uint32_t> philox_of(const std::array<uint32_t, 4>& c, const std::array<uint32_t, 2>& k) {
  const Words words = philox(c[0], c[1], c[2], c[3], k[0], k[1]);
  return Dense<uint32_t>(4, words.w);
}

// Converts as the loops do, to float or double.
template <class A>
Dense<A> load_all(const Array& x) {
  Dense<A> result(x.size());
  A* dst = result.mutable_data();
  for (int64_t i = 0; i < x.size(); i += kStrip) {
    const int n = int(std::min<int64_t>(kStrip, x.size() - i));
    const A* src = load(x.in(), i, n, dst + i);
    if (src != dst + i) std::copy(src, src + n, dst + i);
  }
  return result;
}

template <class Body>
void with_narrow(const std::string& dtype, Body body) {
  const Dtype d = dtype_named(dtype);
  require(d == Dtype::f16 || d == Dtype::bf16, "dtype must be float16 or bfloat16");
  d == Dtype::f16 ? body(half_t()) : body(bfloat_t());
}

Dense<uint16_t> round_all(const Dense<float>& x, const std::string& dtype) {
  Dense<uint16_t> result(x.size());
  with_narrow(dtype, [&](auto t) {
    for (int64_t i = 0; i < x.size(); ++i) result.mutable_data()[i] = uint16_t(round_bits(x.data()[i], t));
  });
  return result;
}

Dense<uint16_t> finish_all(const Dense<float>& v, const Dense<float>& center, float eps, double lo, double hi,
                           const std::string& dtype) {
  require(v.size() == center.size(), "v and center must have one size");
  Dense<uint16_t> result(v.size());
  with_narrow(dtype, [&](auto t) {
    const auto box = make_box<decltype(t)>(lo, hi);
    for (int64_t i = 0; i < v.size(); ++i)
      result.mutable_data()[i] = finish(v.data()[i], center.data()[i], eps, box).bits;
  });
  return result;
}

}  // namespace

PYBIND11_MODULE(ensadv_kernels, m) {
  m.attr("MAX_CHANNELS_LAST") = kMaxChannelsLast;
  py::class_<Array>(m, "Array").def(py::init<py::array, const std::string&>(), py::arg("memory"), py::arg("dtype"));
  py::class_<Range>(m, "Range")
      .def(py::init<int64_t, std::optional<int64_t>, int>(), py::arg("begin") = 0, py::arg("end") = py::none(),
           py::arg("threads") = 1);

  const py::kw_only named;
  const auto range = py::arg("range") = Range{};
  const auto lo = py::arg("lo") = 0.0, hi = py::arg("hi") = 1.0, inner = py::arg("inner") = 1;
  const auto index = py::arg("index").noconvert() = py::none();
  m.def("null", &null, py::arg("x"), py::arg("out"), named, range);
  m.def("sign_step", &sign_step, py::arg("x"), py::arg("grad"), py::arg("out"), py::arg("step"), named,
        py::arg("center") = py::none(), py::arg("eps") = 0.0, lo, hi, inner, range);
  m.def("momentum_step", &momentum_step, py::arg("x"), py::arg("grad"), py::arg("momentum"), py::arg("out"),
        py::arg("step"), named, py::arg("decay") = 1.0, py::arg("center") = py::none(), py::arg("eps") = 0.0, lo, hi,
        inner, range);
  m.def("l2_step", &l2_step, py::arg("x"), py::arg("grad"), py::arg("out"), py::arg("step"), named,
        py::arg("center") = py::none(), py::arg("eps") = 0.0, lo, hi, inner, range);
  m.def("random_step", &random_step, py::arg("x"), py::arg("out"), py::arg("key"), py::arg("eps"), named,
        py::arg("kind") = "rademacher", index, lo, hi, inner, py::arg("channels") = 1, range);
  m.def("sample_eps", &sample_eps, py::arg("out").noconvert(), py::arg("key"), py::arg("dist"), py::arg("eps_max"),
        py::arg("sigma"), named, index);
  m.def("split_key", &split_key, py::arg("key"), py::arg("out").noconvert());
  bind_bias_act(m);
  bind_ensemble_linear(m);
  bind_logit_grad(m);
  bind_matrix_tile(m);
  bind_model_entry(m);
  m.def("philox", &philox_of, py::arg("counter"), py::arg("key"));
  m.def("to_float32", &load_all<float>, py::arg("x"));
  m.def("to_float64", &load_all<double>, py::arg("x"));
  m.def("round_to", &round_all, py::arg("x"), py::arg("dtype"));
  m.def("finish", &finish_all, py::arg("v"), py::arg("center"), py::arg("eps"), py::arg("lo"), py::arg("hi"),
        py::arg("dtype"));
  m.def("normal_quantile", py::vectorize([](double p) { return normal_quantile(p); }), py::arg("p"));
  m.def("quantile", py::vectorize([](float q) { return quantile(q); }), py::arg("q"));
  m.def("log_positive", py::vectorize([](float x) { return log_positive(x); }), py::arg("x"));
}
