// The scores of hierarchical attention, sum_l a_l q^l_[i / 2^l] . k^l_[j / 2^l] / sqrt(e), a block of queries at a time:
// what the forward and the backward kernel share. The scores of a level are added to those of the next coarser one,
// whose elements are cells of two by two.
#pragma once

#include "gemm.h"

// What both kernels take; native/structures.py builds the same structure. Queries and keys are one tensor a level: q[l],
// k[l] (n, rows of l, e), n batch rows and heads, where level l has ceil(t / 2^l) rows. values (n, t, f), weights (heads,
// levels), y (batch, t, heads, f), as the matrix after attention wants it. Of every query, highest and sums (n, t): its
// highest score, and the sum of e^(score - highest).
struct Attention {
  const float* const* q;
  const float* const* k;
  const float *values, *weights;
  float *y, *highest, *sums;
  int64_t n, heads, t, levels, e, f, causal;
  float scale, unused;
};

// Gradients like their tensors, but for dweights, which has a row for each batch row and head (n, levels).
struct AttentionGradients {
  const float* dy;
  float* const* dq;
  float* const* dk;
  float *dvalues, *dweights;
};

namespace {

// Queries of a block, and keys of one in the backward: whole cells of up to six levels.
constexpr int64_t kBlock = 96;
constexpr int64_t kKeys = 256;

INLINE int64_t rows_of(int64_t t, int64_t level) { return (t + (int64_t(1) << level) - 1) >> level; }

// The first number of a row of y: a batch row and head, a position.
INLINE int64_t place_of(int64_t at, int64_t i, int64_t heads, int64_t t, int64_t f) {
  return ((at / heads * t + i) * heads + at % heads) * f;
}

// The first or the last half of a vector, every lane twice.
#if defined(__AVX512F__)
#define FIRST_TWICE(x) __builtin_shufflevector(x, x, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7)
#define LAST_TWICE(x) __builtin_shufflevector(x, x, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15)
#elif defined(__AVX__)
#define FIRST_TWICE(x) __builtin_shufflevector(x, x, 0, 0, 1, 1, 2, 2, 3, 3)
#define LAST_TWICE(x) __builtin_shufflevector(x, x, 4, 4, 5, 5, 6, 6, 7, 7)
#else
#define FIRST_TWICE(x) __builtin_shufflevector(x, x, 0, 0, 1, 1)
#define LAST_TWICE(x) __builtin_shufflevector(x, x, 2, 2, 3, 3)
#endif

// What a product begins from: a matrix of half its rows and columns, each element of which stands for a cell of two by
// two. Blocks begin at even rows. Reads up to half a vector past the columns: rows are padded.
struct Cells {
  const float* data;
  int64_t stride;
  METHOD Cells at(int64_t i, int64_t j) const { return {data + i / 2 * stride + j / 2, stride}; }
  template <int rows, int parts>
  METHOD void begin(Vector (&sum)[rows][parts], const float*, int64_t) const {
    for (int r = 0; r < rows; ++r)
      for (int p = 0; p < parts; ++p) {
        const Vector cells = load(data + r / 2 * stride + p / 2 * kLanes);
        sum[r][p] = p % 2 == 0 ? FIRST_TWICE(cells) : LAST_TWICE(cells);
      }
  }
};

// What one thread needs for the blocks of one batch row and head.
struct Head {
  int64_t t, levels, e;
  const float* const* q;
  int64_t at;
  std::vector<Padded> transposed;  // a_l scale k^l, (e, rows of level l)
  std::vector<Padded> scores;      // of a block, by level; level 0 has all of them in the end

  Head(int64_t t, int64_t levels, int64_t e, int64_t columns) : t(t), levels(levels), e(e), q(nullptr), at(0) {
    for (int64_t l = 0; l < levels; ++l) scores.emplace_back(rows_of(kBlock, l), rows_of(columns, l));
  }

  void take(const float* const* queries, const float* const* keys, int64_t row, const float* weights, float scale) {
    q = queries;
    at = row;
    transposed.clear();
    for (int64_t l = 0; l < levels; ++l)
      transposed.push_back(transpose_of(keys[l] + at * rows_of(t, l) * e, rows_of(t, l), e, weights[l] * scale));
  }

  const float* queries_of(int64_t level, int64_t start) const {
    return q[level] + (at * rows_of(t, level) + (start >> level)) * e;
  }

  // The scores of the queries start..start + count against the keys first..last, in scores[0].
  void make_scores(int64_t start, int64_t count, int64_t first, int64_t last) {
    for (int64_t l = levels - 1; l >= 0; --l) {
      Padded& s = scores[l];
      const Padded& keys = transposed[l];
      const int64_t rows = rows_of(count, l), columns = padded(rows_of(last - first, l));
      const Operand queries = {queries_of(l, start), e, 1};
      const float* from = keys.row(0) + (first >> l);
      if (l + 1 == levels) {
        multiply(queries, from, keys.stride, s.row(0), s.stride, rows, e, columns, false);
        continue;
      }
      // The first pass of the product begins from the coarser scores, which are never written out.
      const Cells cells = {scores[l + 1].row(0), scores[l + 1].stride};
      const int64_t inner = std::min(kInner, e);
      multiply_pass(queries, from, keys.stride, s.row(0), s.stride, rows, inner, columns, cells);
      if (inner < e)
        multiply(queries.part(0, inner), from + inner * keys.stride, keys.stride, s.row(0), s.stride, rows, e - inner,
                 columns, true);
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

}  // namespace
