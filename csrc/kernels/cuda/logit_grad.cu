// One block per sample. Its threads read the members' rows from memory once, into shared memory, and find there
// what one pass after another asks for; a row too long for that is read again, from the L2 cache if it fits.
#include "../logit_grad.h"
#include "loop.cuh"

namespace ensadv {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kGroup = 4;  // members that are loaded, and reduced over, together
constexpr unsigned kAllLanes = 0xffffffffu;

// Entries of a row that a thread handles at a time: one 16-byte word of float64 or of 16 bits, two of float32.
template <class A>
constexpr int kRowPack = 16 / int(sizeof(A)) * (sizeof(A) == 4 ? 2 : 1);

// A score and where it stands; of equal ones the first is the best.
template <class A>
struct Best {
  ordinal_t<A> ordinal = kNoOrdinal<A>;
  int32_t index = INT32_MAX;

  __device__ __forceinline__ void take(const Best& other) {
    const bool better = other.ordinal > ordinal || (other.ordinal == ordinal && other.index < index);
    ordinal = better ? other.ordinal : ordinal;
    index = better ? other.index : index;
  }
  __device__ __forceinline__ Best from_lane(int lane_mask) const {
    return {__shfl_xor_sync(kAllLanes, ordinal, lane_mask), __shfl_xor_sync(kAllLanes, index, lane_mask)};
  }
};

// A sum, and the largest term of it.
template <class A>
struct Terms {
  A sum = 0, largest = 0;

  __device__ __forceinline__ void take(const Terms& other) {
    sum += other.sum;
    largest = other.largest > largest ? other.largest : largest;
  }
  __device__ __forceinline__ Terms from_lane(int lane_mask) const {
    return {__shfl_xor_sync(kAllLanes, sum, lane_mask), __shfl_xor_sync(kAllLanes, largest, lane_mask)};
  }
};

template <class X>
struct Sum {
  X value = 0;

  __device__ __forceinline__ void take(const Sum& other) { value += other.value; }
  __device__ __forceinline__ Sum from_lane(int lane_mask) const { return {__shfl_xor_sync(kAllLanes, value, lane_mask)}; }
};

// What a block keeps of each member: its softmax, and its weight over the softmax's total.
template <class A>
struct Member {
  Softmax<A> softmax;
  A share;
};

// x[g] of all threads combined, in all threads. X{} is the neutral element.
template <class X, int N>
__device__ __forceinline__ void reduce(X (&x)[N]) {
  constexpr int kMaxWarps = kMaxThreads / kWarpLanes;
  __shared__ X partial[N][kMaxWarps];
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes, warps = blockDim.x / kWarpLanes;
#pragma unroll
  for (int mask = kWarpLanes / 2; mask; mask /= 2)
#pragma unroll
    for (int g = 0; g < N; ++g) x[g].take(x[g].from_lane(mask));
  if (warps == 1) return;
  __syncthreads();  // until here a slower warp may have been reading the last results
#pragma unroll
  for (int g = 0; g < N; ++g)
    if (lane == 0) partial[g][warp] = x[g];
  __syncthreads();
#pragma unroll
  for (int g = 0; g < N; ++g) x[g] = lane % kMaxWarps < warps ? partial[g][lane % kMaxWarps] : X{};
#pragma unroll
  for (int mask = kMaxWarps / 2; mask; mask /= 2)
#pragma unroll
    for (int g = 0; g < N; ++g) x[g].take(x[g].from_lane(mask));
}
template <class X>
__device__ __forceinline__ X reduce_one(X x) {
  X one[1] = {x};
  reduce(one);
  return one[0];
}

// One sample, as one block sees it. kSeveral: the members' probabilities or losses are mixed, not their logits.
template <class A, bool kSeveral>
struct Sample {
  static constexpr int V = kRowPack<A>;

  const LogitGradArgs& args;
  Member<A>* members;  // shared memory, [args.members]
  A* cache;            // shared memory, rows of `pitch`: the fused logits, or each member's; null: no room
  int pitch;
  bool aligned;
  int64_t b;
  int32_t y = 0;
  bool valid = true;
  A scale = 1;

  // body(first entry, count) for the packs of a row that this thread handles: the same ones every time.
  template <class Body>
  __device__ __forceinline__ void packs(Body body) const {
    for (int c = int(threadIdx.x) * V; c < args.classes; c += int(blockDim.x) * V)
      body(c, args.classes - c < V ? args.classes - c : V);
  }

  // body(T()) for the logits' type, which is the gradient's.
  template <class Body>
  __device__ __forceinline__ void with_dtypes(Body body) const {
    if constexpr (std::is_same_v<A, double>)
      body(double());
    else
      with_one_of<float, half_t, bfloat_t>(args.logits.dtype, body);
  }

  __device__ __forceinline__ int64_t at(int64_t k) const { return (k * args.batch + b) * args.classes; }
  __device__ __forceinline__ A weight(int64_t k) const { return weight_of<A>(args, k); }

  __device__ __forceinline__ void logits(int64_t k, int c, int count, A* z) const {
    with_dtypes([&](auto t) {
      load_pack<decltype(t), V>(args.logits.data, at(k) + c, count, aligned && count == V, z);
    });
  }
  __device__ __forceinline__ A logit(int64_t k, int c) const {
    A z = 0;
    with_dtypes([&](auto t) { z = to_compute(static_cast<const decltype(t)*>(args.logits.data)[at(k) + c]); });
    return z;
  }
  template <int kAtOnce>
  __device__ __forceinline__ void fused_logits(int c, int count, A* f) const {
#pragma unroll
    for (int j = 0; j < V; ++j) f[j] = A(0);
#pragma unroll kAtOnce
    for (int64_t k = 0; k < args.members; ++k) {
      A z[V];
      logits(k, c, count, z);
      const A w = weight(k);
#pragma unroll
      for (int j = 0; j < V; ++j) f[j] += z[j] * w;
    }
  }

  __device__ __forceinline__ A* cached(int64_t k, int c) const { return cache + k * pitch + c; }

  // The scores of a row: fused logits, or fused probabilities.
  __device__ __forceinline__ void scores(int c, int count, A* f) const {
    if constexpr (kSeveral) {
#pragma unroll
      for (int j = 0; j < V; ++j) f[j] = A(0);
      for (int64_t k = 0; k < args.members; ++k) {
        A e[V];
        exponentials(k, c, count, e);
        const A share = members[k].share;
#pragma unroll
        for (int j = 0; j < V; ++j) f[j] += e[j] * share;
      }
    } else if (cache) {
      load_pack<A, V>(cached(0, c), 0, V, true, f);
    } else {
      fused_logits<1>(c, count, f);
    }
  }
  __device__ __forceinline__ A score(int c) const {
    A f = 0;
    for (int64_t k = 0; k < args.members; ++k)
      if constexpr (kSeveral)
        f += exp_nonpositive(logit(k, c) - members[k].softmax.max) * members[k].share;
      else
        f += logit(k, c) * weight(k);
    return f;
  }

  // Member k's e^(z - max), once the maxima are known.
  __device__ __forceinline__ void exponentials(int64_t k, int c, int count, A* e) const {
    if (cache) {
      load_pack<A, V>(cached(k, c), 0, V, true, e);
    } else {
      logits(k, c, count, e);
      const A max = members[k].softmax.max;
#pragma unroll
      for (int j = 0; j < V; ++j) e[j] = exp_nonpositive(e[j] - max);
    }
  }

  __device__ __forceinline__ void fill_cache() const {
    packs([&](int c, int count) {
      if constexpr (kSeveral) {
#pragma unroll kGroup
        for (int64_t k = 0; k < args.members; ++k) {
          A z[V];
          logits(k, c, count, z);
          store_pack<A, V>(cached(k, c), 0, V, true, z);
        }
      } else {
        A f[V];
        fused_logits<kGroup>(c, count, f);
        store_pack<A, V>(cached(0, c), 0, V, true, f);
      }
    });
  }

  // The best of values(c, count, out) times sign, two entries left out.
  template <class Values>
  __device__ __forceinline__ Best<A> best_of(Values values, A sign, int skip0 = -1, int skip1 = -1) const {
    Best<A> best;
    packs([&](int c, int count) {
      A v[V];
      values(c, count, v);
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (j < count && c + j != skip0 && c + j != skip1) best.take({ordinal_of(v[j] * sign), c + j});
    });
    return reduce_one(best);
  }

  // The softmax of N rows at a time: values(g, c, count, out) gives row g's entries, keep(g, c, e) takes the
  // exponentials, of which those beyond the row's end mean nothing.
  template <int N, class Values, class Keep>
  __device__ __forceinline__ void softmax(Softmax<A> (&s)[N], Values values, Keep keep) const {
    Best<A> best[N];
    packs([&](int c, int count) {
#pragma unroll
      for (int g = 0; g < N; ++g) {
        A v[V];
        values(g, c, count, v);
#pragma unroll
        for (int j = 0; j < V; ++j)
          if (j < count) best[g].take({ordinal_of(v[j]), c + j});
      }
    });
    reduce(best);
    Terms<A> rest[N];
#pragma unroll
    for (int g = 0; g < N; ++g) {
      s[g].max = from_ordinal(best[g].ordinal);
      s[g].top = best[g].index;
    }
    packs([&](int c, int count) {
#pragma unroll
      for (int g = 0; g < N; ++g) {
        A e[V];
        values(g, c, count, e);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          e[j] = exp_nonpositive(e[j] - s[g].max);
          const A term = j < count && c + j != s[g].top ? e[j] : A(0);
          rest[g].take({term, term});
        }
        keep(g, c, e);
      }
    });
    reduce(rest);
#pragma unroll
    for (int g = 0; g < N; ++g) {
      s[g].rest = rest[g].sum;
      s[g].second = rest[g].largest;
    }
  }

  __device__ __forceinline__ void member_softmaxes() const {
    for (int64_t k0 = 0; k0 < args.members; k0 += kGroup) {
      // Where the last group is short, the last member is simply done again.
      const auto member = [&](int g) { return k0 + g < args.members ? k0 + g : args.members - 1; };
      Softmax<A> s[kGroup];
      softmax(
          s,
          [&](int g, int c, int count, A* z) {
            if (cache)
              load_pack<A, V>(cached(member(g), c), 0, V, true, z);
            else
              logits(member(g), c, count, z);
          },
          [&](int g, int c, const A* e) {
            if (cache && k0 + g < args.members) store_pack<A, V>(cached(k0 + g, c), 0, V, true, e);
          });
#pragma unroll
      for (int g = 0; g < kGroup; ++g)
        if (threadIdx.x == 0 && k0 + g < args.members) members[k0 + g] = {s[g], weight(k0 + g) / s[g].total()};
    }
    __syncthreads();
  }

  // grad[k] = values(c, count, out), times weight; the entry at y is `own` where `patch`.
  template <class Values>
  __device__ __forceinline__ void write(int64_t k, A weight, bool patch, A own, Values values) const {
    packs([&](int c, int count) {
      A v[V];
      values(c, count, v);
      with_dtypes([&](auto t) {
        using T = decltype(t);
        T out[V];
#pragma unroll
        for (int j = 0; j < V; ++j) out[j] = round_to<T>(patch && c + j == y ? own : v[j] * weight);
        T* dst = static_cast<T*>(args.grad.data) + at(k) + c;
        if (aligned && count == V) {
          PackWords<T, V> words;
          memcpy(&words, out, sizeof(words));
#pragma unroll
          for (int j = 0; j < words.kCount; ++j)  // plain stores are split up and merged with those below
            __stwb(reinterpret_cast<uint4*>(dst) + j, words.word[j]);
        } else {
          store_pack<T, V>(dst, 0, count, false, out);
        }
      });
    });
  }

  // weight * scale * (p - onehot(y)).
  template <class Values>
  __device__ __forceinline__ void write_entropy(int64_t k, const Softmax<A>& s, A own, A weight, Values e) const {
    const A r = valid ? weight * (scale / s.total()) : A(0);
    write(k, r, true, -s.sum_except(y, own) * r, e);
  }

  __device__ __forceinline__ A entropy_of_logits() {
    Softmax<A> s[1];
    const auto row = [&](int c, int count, A* f) { scores(c, count, f); };
    softmax(s, [&](int, int c, int count, A* f) { row(c, count, f); },
            [&](int, int c, const A* e) {
              if (cache) store_pack<A, V>(cached(0, c), 0, V, true, e);
            });
    const auto exponentials = [&](int c, int count, A* e) {
      row(c, count, e);
      if (cache) return;
#pragma unroll
      for (int j = 0; j < V; ++j) e[j] = exp_nonpositive(e[j] - s[0].max);
    };
    const A own = score(y);
    if (args.rescale) scale = lift(s[0].largest_except(y));
    for (int64_t k = 0; k < args.members; ++k) write_entropy(k, s[0], own, weight(k), exponentials);
    return -s[0].log_probability(own);
  }

  __device__ __forceinline__ A log_probability(int64_t k) const {
    return members[k].softmax.log_probability(logit(k, y));
  }

  __device__ __forceinline__ A entropy_of_members() {
    const Mixture<A> mixed(args, [&](int64_t k) { return log_probability(k); });
    if (args.rescale) {
      const auto row = [&](int c, int count, A* f) { scores(c, count, f); };
      scale = lift(from_ordinal(best_of(row, A(1), y).ordinal) / mixed.total);
    }
    const bool probs = args.fuse == Fuse::probs;
    for (int64_t k = 0; k < args.members; ++k)
      write_entropy(k, members[k].softmax, logit(k, y),
                    probs ? mixed.mean.part(weight(k), log_probability(k)) / mixed.mean.sum : weight(k),
                    [&](int c, int count, A* e) { exponentials(k, c, count, e); });
    return probs ? -mixed.mean.value() : mixed.loss;
  }

  template <class Values>
  __device__ __forceinline__ Margin<A> margin(Values values, A own) const {
    Margin<A> m;
    if (!valid) return m;
    MarginScores<A> s{own, -A(INFINITY), 0};
    if (args.classes > 1) {
      s.rival = from_ordinal(best_of(values, A(1), y).ordinal);
      Sum<int32_t> ties;
      packs([&](int c, int count) {
        A v[V];
        values(c, count, v);
#pragma unroll
        for (int j = 0; j < V; ++j) ties.value += j < count && c + j != y && v[j] == s.rival;
      });
      s.ties = reduce_one(ties).value;
    }
    m.y = y;
    if (args.loss == Loss::dlr) {
      int second = -1;
#pragma unroll 1
      for (int place = 0; place < 3; ++place) {
        const Best<A> best = best_of(values, A(1), m.first, second);
        (place == 0 ? m.first : place == 1 ? second : m.third) = best.index;
        (place == 0 ? s.first : s.third) = from_ordinal(best.ordinal);
      }
    }
    return margin_of(args, s, m);
  }

  __device__ __forceinline__ A margin_of_scores() {
    const auto row = [&](int c, int count, A* f) { scores(c, count, f); };
    const Margin<A> m = margin(row, score(y));
    const auto gradient = [&](int c, int count, A* g) {
      row(c, count, g);
#pragma unroll
      for (int j = 0; j < V; ++j) g[j] = m.grad(c + j, g[j]);
    };
    for (int64_t k = 0; k < args.members; ++k) {
      if constexpr (!kSeveral) {
        write(k, weight(k), false, A(0), gradient);
      } else {  // back through member k's softmax
        Sum<A> dot;
        packs([&](int c, int count) {
          A g[V], e[V];
          gradient(c, count, g);
          exponentials(k, c, count, e);
#pragma unroll
          for (int j = 0; j < V; ++j) dot.value += j < count ? e[j] * g[j] : A(0);
        });
        const A mean = reduce_one(dot).value / members[k].softmax.total();
        write(k, members[k].share, false, A(0), [&](int c, int count, A* v) {
          A g[V];
          gradient(c, count, g);
          exponentials(k, c, count, v);
#pragma unroll
          for (int j = 0; j < V; ++j) v[j] = v[j] * (g[j] - mean);
        });
      }
    }
    return m.loss;
  }

  __device__ __forceinline__ A margins_of_members() {
    A loss = 0;
    for (int64_t k = 0; k < args.members; ++k) {
      const auto row = [&](int c, int count, A* z) { logits(k, c, count, z); };
      const Margin<A> m = margin(row, logit(k, y));
      write(k, weight(k), false, A(0), [&](int c, int count, A* g) {
        row(c, count, g);
#pragma unroll
        for (int j = 0; j < V; ++j) g[j] = m.grad(c + j, g[j]);
      });
      loss += weight(k) * m.loss;
    }
    return loss;
  }

  __device__ __forceinline__ void run() {
    if (cache) fill_cache();
    if constexpr (kSeveral) member_softmaxes();
    int32_t found = 0;
    if (label_needs_scores(args)) {
      const auto row = [&](int c, int count, A* f) { scores(c, count, f); };
      found = best_of(row, A(label_sign(args))).index;
    }
    const int64_t label = choose_label(args, b, found);
    valid = label >= 0 && label < args.classes;
    y = int32_t(label < 0 ? 0 : label >= args.classes ? args.classes - 1 : label);
    A loss;
    if constexpr (kSeveral)
      loss = args.loss == Loss::ce            ? entropy_of_members()
             : args.fuse == Fuse::probs ? margin_of_scores()
                                        : margins_of_members();
    else
      loss = args.loss == Loss::ce ? entropy_of_logits() : margin_of_scores();
    if (threadIdx.x != 0) return;
    args.labels[b] = label;
    static_cast<A*>(args.losses)[b] = valid ? loss : A(NAN);
    static_cast<A*>(args.scales)[b] = scale;
  }
};

// Shared memory: the members, then the cached rows.
template <class A>
__host__ __device__ __forceinline__ int64_t bytes_of_members(const LogitGradArgs& args, bool several) {
  return several ? (args.members * int64_t(sizeof(Member<A>)) + 15) / 16 * 16 : 0;
}

template <class A, bool kSeveral>
__global__ void __launch_bounds__(kMaxThreads, 1) logit_grad_kernel(LogitGradArgs args, int pitch, bool aligned) {
  extern __shared__ uint4 shared[];
  char* base = reinterpret_cast<char*>(shared);
  A* cache = pitch ? reinterpret_cast<A*>(base + bytes_of_members<A>(args, kSeveral)) : nullptr;
  Sample<A, kSeveral> sample{args, reinterpret_cast<Member<A>*>(base), cache, pitch, aligned, int64_t(blockIdx.x)};
  sample.run();
}

template <class A, bool kSeveral>
int run(const LogitGradArgs& args, void* stream) {
  constexpr int64_t V = kRowPack<A>;
  const auto kernel = logit_grad_kernel<A, kSeveral>;
  const int64_t packs = (args.classes + V - 1) / V;
  const int64_t threads = packs < kMaxThreads ? (packs + kWarpLanes - 1) / kWarpLanes * kWarpLanes : kMaxThreads;
  const int64_t rows = kSeveral ? args.members : 1;
  int64_t pitch = packs * V, bytes = bytes_of_members<A>(args, kSeveral) + rows * pitch * int64_t(sizeof(A));
  constexpr int64_t kPlain = 40 << 10;  // with what reduce() takes, below the 48 KiB that need no asking
  if (bytes > kPlain) {
    int device = 0, max_shared = 0;
    constexpr auto kMaxShared = cudaDevAttrMaxSharedMemoryPerBlockOptin;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&max_shared, kMaxShared, device);
    if (error != cudaSuccess) return int(error);
    if (bytes > max_shared - ((48 << 10) - kPlain)) {
      bytes -= rows * pitch * int64_t(sizeof(A));
      pitch = 0;
    } else {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
      if (error != cudaSuccess) return int(error);
    }
  }
  const bool aligned = is_aligned(args.logits.data) && is_aligned(args.grad.data) && args.classes % V == 0;
  kernel<<<unsigned(args.batch), unsigned(threads), size_t(bytes), static_cast<cudaStream_t>(stream)>>>(
      args, int(pitch), aligned);
  return int(cudaGetLastError());
}

template <class A>
int with_fuse(const LogitGradArgs& args, void* stream) {
  return args.fuse == Fuse::logits ? run<A, false>(args, stream) : run<A, true>(args, stream);
}

}  // namespace

int logit_grad_cuda(const LogitGradArgs& args, void* stream) {
  if (args.logits.dtype == Dtype::u8) return int(cudaErrorInvalidValue);
  return args.logits.dtype == Dtype::f64 ? with_fuse<double>(args, stream) : with_fuse<float>(args, stream);
}

}  // namespace ensadv
