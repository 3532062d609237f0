// The images are walked in tiles of pixels that stay in the L1 cache. A tile's inputs are brought to x's order (planes
// or pixels) and computed on in that order; the result changes to its own order once it has its final dtype.
#include "../model_entry.h"

#include <cstring>
#include <type_traits>
#include <vector>

#include "loop.h"
#include "reorder.h"

namespace ensadv {
namespace {

constexpr int64_t kTile = 1536;  // elements

// one: a plane, with one mean and std. each: pixels, with a mean and std for each element.
#define ENSADV_ADD(A)                                                    \
  ENSADV_CLONES void add(const A* a, const A* b, int n, A* out) {        \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) out[i] = a[i] + b[i]; \
  }
#define ENSADV_ENTRY(A, T)                                                                             \
  ENSADV_CLONES void entry_one(const A* v, int n, A mean, A std, const ModelEntry<A>& f, T* out) {     \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i)                                                     \
      out[i] = round_to<T>(f.centered(v[i], mean) / std);                                              \
  }                                                                                                    \
  ENSADV_CLONES void entry_each(const A* v, int n, const A* mean, const A* std,                        \
                                const ModelEntry<A>& f, T* out) {                                      \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i)                                                     \
      out[i] = round_to<T>(f.centered(v[i], mean[i]) / std[i]);                                        \
  }                                                                                                    \
  ENSADV_CLONES void grad_one(const A* g, const A* v, int n, A std, const ModelEntry<A>& f,            \
                              T* out) {                                                                \
    if (v)                                                                                             \
      ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) out[i] = round_to<T>(f.passed(g[i], v[i]) / std); \
    else                                                                                               \
      ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) out[i] = round_to<T>(g[i] / std);                 \
  }                                                                                                    \
  ENSADV_CLONES void grad_each(const A* g, const A* v, int n, const A* std, const ModelEntry<A>& f,    \
                               T* out) {                                                               \
    if (v)                                                                                             \
      ENSADV_INDEPENDENT for (int i = 0; i < n; ++i)                                                   \
        out[i] = round_to<T>(f.passed(g[i], v[i]) / std[i]);                                           \
    else                                                                                               \
      ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) out[i] = round_to<T>(g[i] / std[i]);              \
  }
// Adds half a unit and truncates. That is wrong for some numbers, which Affine rules out.
ENSADV_HD bfloat_t round_shortly(float v, bfloat_t) { return {uint16_t((float_bits(v) + 0x8000u) >> 16)}; }
ENSADV_HD half_t round_shortly(float v, half_t) { return round_to<half_t>(v); }

#define ENSADV_AFFINE(T)                                                                                   \
  ENSADV_CLONES void affine_one(const uint8_t* v, int n, float a, float b, T* out) {                       \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) out[i] = round_shortly(float(v[i]) * a + b, T{});       \
  }                                                                                                        \
  ENSADV_CLONES void affine_each(const uint8_t* v, int n, const float* a, const float* b, T* out) {        \
    ENSADV_INDEPENDENT for (int i = 0; i < n; ++i) out[i] = round_shortly(float(v[i]) * a[i] + b[i], T{}); \
  }
ENSADV_AFFINE(half_t)
ENSADV_AFFINE(bfloat_t)
#undef ENSADV_AFFINE

#define ENSADV_ENTRIES(A) \
  ENSADV_ADD(A)           \
  ENSADV_ENTRY(A, float)  \
  ENSADV_ENTRY(A, double) \
  ENSADV_ENTRY(A, half_t) \
  ENSADV_ENTRY(A, bfloat_t)
ENSADV_ENTRIES(float)
ENSADV_ENTRIES(double)
#undef ENSADV_ENTRIES
#undef ENSADV_ENTRY
#undef ENSADV_ADD

// The tile at hand: pixels [p, p + n) of a sample.
struct Place {
  int64_t sample, p;
  int n;
};

// body(tile) for the tiles of [begin, end), which counts the pixels of the whole batch.
template <class Body>
void for_each_tile(const ModelEntryArgs& args, int64_t begin, int64_t end, Body body) {
  const int max_pixels = int(std::max<int64_t>(1, kTile / args.channels));
  for_each_strip({args.batch * args.spatial, args.spatial}, true, max_pixels, begin, end,
                 [&](int64_t i, int n, int64_t sample) { body(Place{sample, i - sample * args.spatial, n}); });
}

// Where the tile begins in memory, or its channel c if memory holds planes.
int64_t offset(const ModelEntryArgs& args, bool channels_last, const Place& at, int64_t c) {
  const int64_t first = at.sample * args.spatial * args.channels;
  return first + (channels_last ? at.p * args.channels : c * args.spatial + at.p);
}

// Reads tiles in x's order: as planes, or as pixels if `channels_last`.
template <class A>
class Reader {
 public:
  Reader(const ModelEntryArgs& args, const Pixels& from, bool channels_last)
      : args_(args), from_(from), channels_last_(channels_last), scratch_(from.in.data ? size_t(2 * room(args)) : 0) {}
  static int64_t room(const ModelEntryArgs& args) { return std::max(kTile, args.channels); }

  bool given() const { return from_.in.data; }

  void go_to(const Place& at) {
    at_ = at;
    if (!given() || from_.channels_last == channels_last_) return;
    const int64_t channels = args_.channels;
    A* reordered = scratch_.data() + room(args_);
    if (channels_last_) {
      for (int64_t c = 0; c < channels; ++c) {
        A* plane = scratch_.data() + c * at.n;
        const A* read = fetch(c, at.n, plane);
        if (read != plane) memcpy(plane, read, size_t(at.n) * sizeof(A));
      }
      interleave(scratch_.data(), at.n, channels, at.n, reordered);
    } else {
      split(fetch(0, int(at.n * channels), scratch_.data()), channels, at.n, reordered, at.n);
    }
  }
  const A* plane(int64_t c) {
    return from_.channels_last ? scratch_.data() + room(args_) + c * at_.n : fetch(c, at_.n, scratch_.data());
  }
  const A* pixels() {
    return from_.channels_last ? fetch(0, int(at_.n * args_.channels), scratch_.data())
                               : scratch_.data() + room(args_);
  }

 private:
  const A* fetch(int64_t c, int n, A* to) const {
    return load(from_.in, offset(args_, from_.channels_last, at_, c), n, to);
  }

  const ModelEntryArgs& args_;
  const Pixels from_;
  const bool channels_last_;
  std::vector<A> scratch_;  // two halves: as read, and reordered
  Place at_{};
};

// Tiles of x + delta, or of x without delta; null if x is absent.
template <class A>
class Image {
 public:
  explicit Image(const ModelEntryArgs& args)
      : x_(args, args.x, args.x.channels_last), delta_(args, args.delta, args.x.channels_last),
        scratch_(delta_.given() ? size_t(Reader<A>::room(args)) : 0) {}

  void go_to(const Place& at) {
    x_.go_to(at);
    delta_.go_to(at);
  }
  const A* plane(int64_t c, int n) {
    return !x_.given() ? nullptr : delta_.given() ? sum(x_.plane(c), delta_.plane(c), n) : x_.plane(c);
  }
  const A* pixels(int n) {
    return !x_.given() ? nullptr : delta_.given() ? sum(x_.pixels(), delta_.pixels(), n) : x_.pixels();
  }

 private:
  const A* sum(const A* x, const A* delta, int n) {
    add(x, delta, n, scratch_.data());
    return scratch_.data();
  }

  Reader<A> x_, delta_;
  std::vector<A> scratch_;
};

// Takes the result of a tile in x's order, as planes or pixels, and brings it to its place in the result's order.
template <class T>
class Writer {
 public:
  Writer(const ModelEntryArgs& args, bool channels_last)
      : args_(args), channels_last_(channels_last),
        scratch_(channels_last == args.out_channels_last ? 0 : size_t(Reader<float>::room(args))) {}

  T* plane(const Place& at, int64_t c) { return args_.out_channels_last ? scratch_.data() + c * at.n : target(at, c); }
  T* pixels(const Place& at) { return args_.out_channels_last ? target(at, 0) : scratch_.data(); }
  void finish(const Place& at) {
    if (channels_last_ == args_.out_channels_last) return;
    if (channels_last_)
      split(raw(scratch_.data()), args_.channels, at.n, raw(target(at, 0)), args_.spatial);
    else
      interleave(raw(scratch_.data()), at.n, args_.channels, at.n, raw(target(at, 0)));
  }

 private:
  T* target(const Place& at, int64_t c) const {
    return static_cast<T*>(args_.out.data) + offset(args_, args_.out_channels_last, at, c);
  }

  const ModelEntryArgs& args_;
  const bool channels_last_;
  std::vector<T> scratch_;
};

// `values`, one per channel, repeated for each element of a tile of pixels. Planes need one per channel alone.
template <class A>
std::vector<A> per_element(const ModelEntryArgs& args, bool channels_last, const void* values) {
  std::vector<A> result(size_t(channels_last ? Reader<A>::room(args) : args.channels));
  for (size_t i = 0; i < result.size(); ++i) result[i] = static_cast<const A*>(values)[i % size_t(args.channels)];
  return result;
}

// Bytes to 16 bits by one multiplication and one addition in place of two divisions. The results are nearly always the
// same. Since there are only 256 bytes, all are compared beforehand, channel by channel.
template <class T>
class Affine {
 public:
  Affine(const ModelEntryArgs& args, bool channels_last) {
    if constexpr (kPossible) {
      if (!args.x.bytes() || args.delta.in.data || args.in_double) return;
      const ModelEntry<float> f(args.clamp);
      uint8_t bytes[256];
      float images[256];
      for (int v = 0; v < 256; ++v) images[v] = to_compute(level_t{bytes[v] = uint8_t(v)});
      for (int64_t c = 0; c < args.channels; ++c) {
        const float mean = static_cast<const float*>(args.mean)[c], std = static_cast<const float*>(args.std)[c];
        a_.push_back(float(1.0 / (255.0 * double(std))));
        b_.push_back(float(-double(mean) / double(std)));
        T wanted[256], got[256];
        entry_one(images, 256, mean, std, f, wanted);
        affine_one(bytes, 256, a_.back(), b_.back(), got);
        holds_.push_back(memcmp(wanted, got, sizeof(got)) == 0);
      }
      all_ = std::find(holds_.begin(), holds_.end(), false) == holds_.end();
      for (int64_t i = args.channels; all_ && channels_last && i < Reader<float>::room(args); ++i) {
        a_.push_back(a_[size_t(i - args.channels)]);
        b_.push_back(b_[size_t(i - args.channels)]);
      }
    }
  }

  bool holds(int64_t c) const { return !holds_.empty() && holds_[size_t(c)]; }
  bool holds() const { return all_; }
  void one(const uint8_t* v, int n, int64_t c, T* out) const {
    if constexpr (kPossible) affine_one(v, n, a_[size_t(c)], b_[size_t(c)], out);
  }
  void each(const uint8_t* v, int n, T* out) const {
    if constexpr (kPossible) affine_each(v, n, a_.data(), b_.data(), out);
  }

 private:
  static constexpr bool kPossible = sizeof(T) == 2;
  std::vector<float> a_, b_;
  std::vector<bool> holds_;
  bool all_ = false;
};

template <class A, class T>
void entry(const ModelEntryArgs& args, int64_t begin, int64_t end) {
  const ModelEntry<A> f(args.clamp);
  const bool channels_last = args.x.channels_last;
  Image<A> image(args);
  Writer<T> out(args, channels_last);
  const Affine<T> affine(args, channels_last);
  const std::vector<A> mean = per_element<A>(args, channels_last, args.mean);
  const std::vector<A> std = per_element<A>(args, channels_last, args.std);
  for_each_tile(args, begin, end, [&](const Place& at) {
    image.go_to(at);
    const int n = int(at.n * args.channels);
    const uint8_t* bytes = static_cast<const uint8_t*>(args.x.in.data);
    if (channels_last && affine.holds()) {
      affine.each(bytes + offset(args, true, at, 0), n, out.pixels(at));
    } else if (channels_last) {
      entry_each(image.pixels(n), n, mean.data(), std.data(), f, out.pixels(at));
    }
    for (int64_t c = 0; c < args.channels && !channels_last; ++c) {
      if (affine.holds(c))
        affine.one(bytes + offset(args, false, at, c), at.n, c, out.plane(at, c));
      else
        entry_one(image.plane(c, at.n), at.n, mean[size_t(c)], std[size_t(c)], f, out.plane(at, c));
    }
    out.finish(at);
  });
}

template <class A, class T>
void entry_grad(const ModelEntryArgs& args, int64_t begin, int64_t end) {
  const ModelEntry<A> f(args.clamp);
  const bool channels_last = args.out_channels_last;
  Image<A> image(args);
  Reader<A> grad(args, args.grad, channels_last);
  Writer<T> out(args, channels_last);
  const std::vector<A> std = per_element<A>(args, channels_last, args.std);
  for_each_tile(args, begin, end, [&](const Place& at) {
    image.go_to(at);
    grad.go_to(at);
    if (channels_last) {
      const int n = int(at.n * args.channels);
      grad_each(grad.pixels(), image.pixels(n), n, std.data(), f, out.pixels(at));
    } else {
      for (int64_t c = 0; c < args.channels; ++c)
        grad_one(grad.plane(c), image.plane(c, at.n), at.n, std[size_t(c)], f, out.plane(at, c));
    }
  });
}

}  // namespace

void model_entry_cpu(const ModelEntryArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.out.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (!std::is_same_v<T, level_t>)
      (args.in_double ? entry<double, T> : entry<float, T>)(args, begin, end);
  });
}

void model_entry_grad_cpu(const ModelEntryArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.out.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (!std::is_same_v<T, level_t>)
      (args.in_double ? entry_grad<double, T> : entry_grad<float, T>)(args, begin, end);
  });
}

}  // namespace ensadv
