// The logits and scores of one sample as one block reads them, their softmax, and where the gradient is written.
#pragma once

#include "block_reduce.cuh"

namespace ensadv {

constexpr int kGroup = 4;  // members that are loaded, and reduced over, together

// Entries of a row that a thread handles at a time: one 16-byte word of float64 or of 16 bits, two of float32.
template <class A>
constexpr int kRowPack = 16 / int(sizeof(A)) * (sizeof(A) == 4 ? 2 : 1);

// A member's softmax, and its weight divided by the softmax's total.
template <class A>
struct Member {
  Softmax<A> softmax;
  A share;
};

// The rows of one sample, of which a block holds the state. kSeveral: the members' probabilities or losses are mixed;
// else their logits are.
template <class A, bool kSeveral>
struct LogitRows {
  static constexpr int V = kRowPack<A>;

  const LogitGradArgs& args;
  Member<A>* members;  // shared memory, [args.members]
  A* cache;            // shared memory, rows of `pitch`: the fused logits, or each member's; null if they do not fit
  int pitch;
  bool aligned;
  int64_t b;
  int32_t y = 0;
  bool valid = true;
  A scale = 1;

  // body(first entry, count) for the packs of a row that this thread handles: the same packs at every call.
  template <class Body>
  __device__ __forceinline__ void packs(Body body) const {
    for (int c = int(threadIdx.x) * V; c < args.classes; c += int(blockDim.x) * V)
      body(c, args.classes - c < V ? args.classes - c : V);
  }

  // body(T()) for the type of the logits, which is that of the gradient.
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

  // The sample's scores: fused logits, or fused probabilities.
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

  // Member k's e^(z - max). The maxima must be known: the cache then holds exponentials in place of logits.
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

  // The best of values(c, count, out) times sign, without entries skip0 and skip1.
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

  // The softmax of N rows at a time. values(g, c, count, out) gives row g's entries; store(g, c, e) takes their
  // exponentials, of which those beyond the row's end are undefined.
  template <int N, class Values, class Store>
  __device__ __forceinline__ void softmax(Softmax<A> (&s)[N], Values values, Store store) const {
    find_maxima(s, values);
    Terms<A> rest[N];
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
        store(g, c, e);
      }
    });
    reduce(rest);
#pragma unroll
    for (int g = 0; g < N; ++g) {
      s[g].rest = rest[g].sum;
      s[g].second = rest[g].largest;
    }
  }

  template <int N, class Values>
  __device__ __forceinline__ void find_maxima(Softmax<A> (&s)[N], Values values) const {
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
#pragma unroll
    for (int g = 0; g < N; ++g) {
      s[g].max = from_ordinal(best[g].ordinal);
      s[g].top = best[g].index;
    }
  }

  __device__ __forceinline__ void member_softmaxes() const {
    for (int64_t k0 = 0; k0 < args.members; k0 += kGroup) {
      // A short last group repeats the last member.
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

  // grad[k] = weight * values(c, count, out); if `patch`, the entry at y is `own`.
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
          for (int j = 0; j < words.kCount; ++j)  // nvcc would split plain stores to merge them with those below
            __stwb(reinterpret_cast<uint4*>(dst) + j, words.word[j]);
        } else {
          store_pack<T, V>(dst, 0, count, false, out);
        }
      });
    });
  }
};

}  // namespace ensadv
