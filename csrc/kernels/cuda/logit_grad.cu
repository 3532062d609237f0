// One block per sample. Its threads read the members' rows from memory once and keep them in shared memory, where
// several passes use them. A row too long for that is read again in each pass, from the L2 cache if it fits.
#include "logit_rows.cuh"

namespace ensadv {
namespace {

// The loss and the gradient of one sample.
template <class A, bool kSeveral>
struct Sample : LogitRows<A, kSeveral> {
  using Rows = LogitRows<A, kSeveral>;
  using Rows::args, Rows::members, Rows::cache, Rows::b, Rows::y, Rows::valid, Rows::scale, Rows::V;
  using Rows::packs, Rows::logits, Rows::logit, Rows::weight, Rows::cached, Rows::fill_cache, Rows::scores, Rows::score;
  using Rows::exponentials, Rows::best_of, Rows::softmax, Rows::member_softmaxes, Rows::write;

  // Writes weight * scale * (p - onehot(y)).
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
      loss = args.loss == Loss::ce      ? entropy_of_members()
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

// The members' share of shared memory. The cached rows follow.
template <class A>
__host__ __device__ __forceinline__ int64_t bytes_of_members(const LogitGradArgs& args, bool several) {
  return several ? (args.members * int64_t(sizeof(Member<A>)) + 15) / 16 * 16 : 0;
}

template <class A, bool kSeveral>
__global__ void __launch_bounds__(kMaxThreads, 1) logit_grad_kernel(LogitGradArgs args, int pitch, bool aligned) {
  extern __shared__ uint4 shared[];
  char* base = reinterpret_cast<char*>(shared);
  A* cache = pitch ? reinterpret_cast<A*>(base + bytes_of_members<A>(args, kSeveral)) : nullptr;
  Sample<A, kSeveral> sample{{args, reinterpret_cast<Member<A>*>(base), cache, pitch, aligned, int64_t(blockIdx.x)}};
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
  constexpr int64_t kPlain = 40 << 10;  // and what reduce() takes: within the 48 KiB that need no opting in
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
