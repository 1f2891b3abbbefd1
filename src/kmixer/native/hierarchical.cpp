// Hierarchical attention, y_i = sum_j softmax_j(S_ij) v_j with the scores S of hierarchical.h, a block of queries at a
// time: its scores stay in the cache. Rows of batch and heads are shared by the threads.

#include "hierarchical.h"

extern "C" {

int64_t attention_size() { return sizeof(Attention); }

void hierarchical_forward(const Attention* attention, int64_t threads) {
  const Attention a = *attention;
  parallel(a.n, threads, [=](int64_t begin, int64_t end, int64_t) {
    Head head(a.t, a.levels, a.e, a.t);
    Padded out(kBlock, a.f);
    for (int64_t at = begin; at < end; ++at) {
      head.take(a.q, a.k, at, a.weights + at % a.heads * a.levels, a.scale);
      const Padded v = copy_of(a.values + at * a.t * a.f, a.t, a.f);
      for (int64_t start = 0; start < a.t; start += kBlock) {
        const int64_t count = std::min(kBlock, a.t - start), seen = a.causal ? start + count : a.t;
        head.make_scores(start, count, 0, seen);
        Padded& p = head.scores[0];
        float* sums = a.sums + at * a.t + start;
        for (int64_t i = 0; i < count; ++i)
          a.highest[at * a.t + start + i] =
              exponentiate(p.row(i), a.causal ? start + i + 1 : seen, padded(seen), &sums[i]);
        multiply({p.row(0), p.stride, 1}, v.row(0), v.stride, out.row(0), out.stride, count, seen, padded(a.f), false);
        for (int64_t i = 0; i < count; ++i) {
          float* y = a.y + place_of(at, start + i, a.heads, a.t, a.f);
          for (int64_t j = 0; j < a.f; ++j) y[j] = out.row(i)[j] / sums[i];
        }
      }
    }
  });
}

}  // extern "C"
