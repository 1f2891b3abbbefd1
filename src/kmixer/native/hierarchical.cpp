// Hierarchical attention, y_i = sum_j softmax_j(sum_l a_l q^l_[i / 2^l] . k^l_[j / 2^l]) v_j, a block of queries at a
// time: its scores stay in the cache, and the backward makes them again. Rows of batch and heads are shared by the
// threads.
//
// Queries and keys of all levels lie one level after the other: q, k (rows, e) of one batch row and head, where
// level l has ceil(t / 2^l) of the rows. Coarse scores are spread from level to level, by two each time.

#include "gemm.h"

namespace {

// Queries of a block: whole cells of up to six levels.
constexpr int64_t kBlock = 96;

INLINE int64_t rows_of(int64_t t, int64_t level) { return (t + (int64_t(1) << level) - 1) >> level; }

INLINE int64_t first_row(int64_t t, int64_t level) {
  int64_t first = 0;
  for (int64_t l = 0; l < level; ++l) first += rows_of(t, l);
  return first;
}

// to (columns, rows) = factor times the first columns of `from` (rows, columns), transposed; sixteen columns a time, so
// that what is written stays in cache.
void write_transposed(const Padded& from, int64_t columns, float factor, float* to) {
  const int64_t rows = int64_t(from.data.size()) / from.stride;
  for (int64_t first = 0; first < columns; first += kPadding)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = first; j < std::min(first + kPadding, columns); ++j) to[j * rows + i] = factor * from.row(i)[j];
}

// to[2j] = to[2j + 1] = from[j]; columns of `to` are even.
INLINE void spread_row(const float* __restrict from, float* __restrict to, int64_t columns) {
  for (int64_t j = 0; j < columns / 2; ++j) to[2 * j] = to[2 * j + 1] = from[j];
}

// What one thread needs for the blocks of one batch row and head.
struct Head {
  int64_t t, levels, e;
  const float* q;
  std::vector<Padded> transposed;  // a_l scale k^l, (e, rows of level l)
  std::vector<Padded> scores;      // of a block, by level; level 0 has all of them in the end

  Head(int64_t t, int64_t levels, int64_t e) : t(t), levels(levels), e(e), q(nullptr) {
    for (int64_t l = 0; l < levels; ++l) scores.emplace_back(rows_of(kBlock, l), rows_of(t, l));
  }

  void take(const float* queries, const float* keys, const float* weights, float scale) {
    q = queries;
    transposed.clear();
    for (int64_t l = 0; l < levels; ++l)
      transposed.push_back(transpose_of(keys + first_row(t, l) * e, rows_of(t, l), e, weights[l] * scale));
  }

  const float* queries_of(int64_t level, int64_t start) const {
    return q + (first_row(t, level) + (start >> level)) * e;
  }

  // The scores of the queries start..start + count against the first `seen` keys, in scores[0].
  void make_scores(int64_t start, int64_t count, int64_t seen) {
    for (int64_t l = levels - 1; l >= 0; --l) {
      Padded& s = scores[l];
      const int64_t rows = rows_of(count, l), columns = padded(rows_of(seen, l));
      const bool coarser = l + 1 < levels;
      for (int64_t i = 0; coarser && i < rows; ++i) spread_row(scores[l + 1].row(i / 2), s.row(i), columns);
      multiply({queries_of(l, start), e, 1}, transposed[l].row(0), transposed[l].stride, s.row(0), s.stride, rows, e,
               columns, coarser);
    }
  }
};

// e^(x - highest) in place, zero beyond `count`; returns the highest, and the sum.
INLINE float exponentiate(float* x, int64_t count, int64_t columns, float* total) {
  const float highest = highest_of(x, count);
  float sum = 0;
  for (int64_t j = 0; j < count; ++j) sum += x[j] = exp_negative(x[j] - highest);
  std::fill(x + count, x + columns, 0.0f);
  *total = sum;
  return highest;
}

// to[i][j] = the sum of the cell of two rows and two columns; what lies past the end counts as nothing.
INLINE void gather(const Padded& from, Padded& to, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < (rows + 1) / 2; ++i) {
    const float *upper = from.row(2 * i), *lower = 2 * i + 1 < rows ? from.row(2 * i + 1) : nullptr;
    float* out = to.row(i);
    for (int64_t j = 0; j < columns / 2; ++j) out[j] = upper[2 * j] + upper[2 * j + 1];
    if (lower != nullptr)
      for (int64_t j = 0; j < columns / 2; ++j) out[j] += lower[2 * j] + lower[2 * j + 1];
    std::fill(out + columns / 2, out + padded(columns / 2), 0.0f);
  }
}

}  // namespace

extern "C" {

// y (n, t, f), normaliser (n, t); q, k (n, rows, e), values (n, t, f), weights (heads, levels); n is batch x heads.
void hierarchical_forward(const float* q, const float* k, const float* values, const float* weights, float* y,
                          float* normaliser, int64_t n, int64_t heads, int64_t t, int64_t levels, int64_t e, int64_t f,
                          float scale, int64_t causal, int64_t threads) {
  const int64_t all = first_row(t, levels);
  parallel(n, threads, [=](int64_t begin, int64_t end, int64_t) {
    Head head(t, levels, e);
    Padded out(kBlock, f);
    for (int64_t at = begin; at < end; ++at) {
      head.take(q + at * all * e, k + at * all * e, weights + at % heads * levels, scale);
      const Padded v = copy_of(values + at * t * f, t, f);
      for (int64_t start = 0; start < t; start += kBlock) {
        const int64_t count = std::min(kBlock, t - start), seen = causal ? start + count : t;
        head.make_scores(start, count, seen);
        Padded& p = head.scores[0];
        float sums[kBlock];
        for (int64_t i = 0; i < count; ++i) {
          const float highest = exponentiate(p.row(i), causal ? start + i + 1 : seen, padded(seen), &sums[i]);
          normaliser[at * t + start + i] = highest + std::log(sums[i]);
        }
        multiply({p.row(0), p.stride, 1}, v.row(0), v.stride, out.row(0), out.stride, count, seen, padded(f), false);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = 0; j < f; ++j) y[(at * t + start + i) * f + j] = out.row(i)[j] / sums[i];
      }
    }
  });
}

// dq, dk, dvalues like q, k, values, and dweights (n, levels), from dy and what the forward pass made.
void hierarchical_backward(const float* q, const float* k, const float* values, const float* weights, const float* y,
                           const float* normaliser, const float* dy, float* dq, float* dk, float* dvalues,
                           float* dweights, int64_t n, int64_t heads, int64_t t, int64_t levels, int64_t e, int64_t f,
                           float scale, int64_t causal, int64_t threads) {
  const int64_t all = first_row(t, levels);
  parallel(n, threads, [=](int64_t begin, int64_t end, int64_t) {
    Head head(t, levels, e);
    Padded products(kBlock, e);
    std::vector<Padded> gradients;
    for (int64_t l = 0; l < levels; ++l) gradients.emplace_back(rows_of(kBlock, l), rows_of(t, l));
    for (int64_t at = begin; at < end; ++at) {
      const float *keys = k + at * all * e, *alpha = weights + at % heads * levels;
      head.take(q + at * all * e, keys, alpha, scale);
      const Padded v = transpose_of(values + at * t * f, t, f, 1.0f);
      // Transposed, so that the small operand of their products is the one that is read across its rows.
      Padded dv(f, t);
      std::vector<Padded> rows_of_keys, dkeys;
      for (int64_t l = 0; l < levels; ++l) {
        rows_of_keys.push_back(copy_of(keys + first_row(t, l) * e, rows_of(t, l), e));
        dkeys.emplace_back(e, rows_of(t, l));
        dweights[at * levels + l] = 0;
      }
      for (int64_t start = 0; start < t; start += kBlock) {
        const int64_t count = std::min(kBlock, t - start), seen = causal ? start + count : t;
        const int64_t columns = padded(seen);
        head.make_scores(start, count, seen);
        Padded &p = head.scores[0], &ds = gradients[0];
        const float* grad = dy + (at * t + start) * f;
        multiply({grad, f, 1}, v.row(0), v.stride, ds.row(0), ds.stride, count, f, columns, false);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t here = at * t + start + i, last = causal ? start + i + 1 : seen;
          const float shift = normaliser[here];
          float carried = 0, *weight = p.row(i), *change = ds.row(i);
          for (int64_t j = 0; j < f; ++j) carried += y[here * f + j] * dy[here * f + j];
          for (int64_t j = 0; j < last; ++j) {
            weight[j] = exp_negative(weight[j] - shift);
            change[j] = weight[j] * (change[j] - carried);
          }
          std::fill(weight + last, weight + columns, 0.0f);
          std::fill(change + last, change + columns, 0.0f);
        }
        multiply({grad, 1, f}, p.row(0), p.stride, dv.row(0), dv.stride, f, count, columns, true);
        for (int64_t l = 0; l < levels; ++l) {
          const int64_t rows = rows_of(count, l), width = rows_of(seen, l), first = first_row(t, l) + (start >> l);
          const float factor = alpha[l] * scale, *queries = head.queries_of(l, start);
          if (l > 0) gather(gradients[l - 1], gradients[l], rows_of(count, l - 1), padded(rows_of(seen, l - 1)));
          Padded& g = gradients[l];
          multiply({g.row(0), g.stride, 1}, rows_of_keys[l].row(0), rows_of_keys[l].stride, products.row(0),
                   products.stride, rows, width, padded(e), false);
          float sum = 0;
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < e; ++j) {
              const float product = products.row(i)[j];
              sum += product * queries[i * e + j];
              dq[(at * all + first + i) * e + j] = factor * product;
            }
          dweights[at * levels + l] += scale * sum;
          multiply({queries, 1, e}, g.row(0), g.stride, dkeys[l].row(0), dkeys[l].stride, e, rows, padded(width), true);
        }
      }
      write_transposed(dv, t, 1.0f, dvalues + at * t * f);
      for (int64_t l = 0; l < levels; ++l)
        write_transposed(dkeys[l], rows_of(t, l), alpha[l] * scale, dk + (at * all + first_row(t, l)) * e);
    }
  });
}

}  // extern "C"
