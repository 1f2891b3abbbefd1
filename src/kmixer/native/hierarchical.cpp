// Hierarchical attention, y_i = sum_j softmax_j(sum_l a_l q^l_[i / 2^l] . k^l_[j / 2^l]) v_j, a block of queries at a
// time: its scores stay in the cache, and the backward makes them again, a block of keys at a time. Rows of batch and
// heads are shared by the threads.
//
// Queries and keys are one tensor a level: q[l], k[l] (n, rows of l, e), n batch rows and heads, where level l has
// ceil(t / 2^l) rows. y and its gradient are (batch, t, heads, f), as the matrix after attention wants them. The
// scores of a level are added to those of the next coarser one, whose elements are cells of two by two.

#include "gemm.h"

namespace {

// Queries of a block, and keys of one in the backward: whole cells of up to six levels.
constexpr int64_t kBlock = 96;
constexpr int64_t kKeys = 256;

INLINE int64_t rows_of(int64_t t, int64_t level) { return (t + (int64_t(1) << level) - 1) >> level; }

// The first number of a row of y: a batch row and head, a position.
INLINE int64_t place_of(int64_t at, int64_t i, int64_t heads, int64_t t, int64_t f) {
  return ((at / heads * t + i) * heads + at % heads) * f;
}

// to (columns, rows) = factor times the first columns of `from` (rows, columns), transposed; sixteen columns a time, so
// that what is written stays in cache.
void write_transposed(const Padded& from, int64_t columns, float factor, float* to) {
  const int64_t rows = int64_t(from.data.size()) / from.stride;
  for (int64_t first = 0; first < columns; first += kPadding)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = first; j < std::min(first + kPadding, columns); ++j) to[j * rows + i] = factor * from.row(i)[j];
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

// Of every group of four lanes: the first and third of a and b, the second and fourth; and such groups in order.
#if defined(__AVX512F__)
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31)
#define IN_ORDER(x) __builtin_shufflevector(x, x, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)
#elif defined(__AVX__)
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15)
#define IN_ORDER(x) __builtin_shufflevector(x, x, 0, 1, 4, 5, 2, 3, 6, 7)
#else
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7)
#define IN_ORDER(x) (x)
#endif

// Row i of `to`: the sums of the cells of two rows and two columns; what lies past the end counts as nothing.
INLINE void gather_row(const Padded& from, Padded& to, int64_t i, int64_t rows, int64_t columns) {
  const float *upper = from.row(2 * i), *lower = from.row(2 * i + 1 < rows ? 2 * i + 1 : 2 * i);
  const float factor = 2 * i + 1 < rows ? 1.0f : 0.0f;
  float* out = to.row(i);
  // Reads up to two vectors past the columns of `from`: rows are padded, and what comes of them is made zero below.
  for (int64_t j = 0; j < padded(columns / 2); j += kLanes) {
    const Vector first = load(upper + 2 * j) + factor * load(lower + 2 * j);
    const Vector second = load(upper + 2 * j + kLanes) + factor * load(lower + 2 * j + kLanes);
    const Vector pairs = EVEN(first, second) + ODD(first, second);
    store(IN_ORDER(pairs), out + j);
  }
  std::fill(out + columns / 2, out + padded(columns / 2), 0.0f);
}

}  // namespace

extern "C" {

// y and normaliser (n, t) from q, k, values (n, t, f) and weights (heads, levels).
void hierarchical_forward(const float* const* q, const float* const* k, const float* values, const float* weights,
                          float* y, float* normaliser, int64_t n, int64_t heads, int64_t t, int64_t levels, int64_t e,
                          int64_t f, float scale, int64_t causal, int64_t threads) {
  parallel(n, threads, [=](int64_t begin, int64_t end, int64_t) {
    Head head(t, levels, e, t);
    Padded out(kBlock, f);
    for (int64_t at = begin; at < end; ++at) {
      head.take(q, k, at, weights + at % heads * levels, scale);
      const Padded v = copy_of(values + at * t * f, t, f);
      for (int64_t start = 0; start < t; start += kBlock) {
        const int64_t count = std::min(kBlock, t - start), seen = causal ? start + count : t;
        head.make_scores(start, count, 0, seen);
        Padded& p = head.scores[0];
        float sums[kBlock];
        for (int64_t i = 0; i < count; ++i) {
          const float highest = exponentiate(p.row(i), causal ? start + i + 1 : seen, padded(seen), &sums[i]);
          normaliser[at * t + start + i] = highest + std::log(sums[i]);
        }
        multiply({p.row(0), p.stride, 1}, v.row(0), v.stride, out.row(0), out.stride, count, seen, padded(f), false);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = 0; j < f; ++j) y[place_of(at, start + i, heads, t, f) + j] = out.row(i)[j] / sums[i];
      }
    }
  });
}

// dq, dk, dvalues like q, k, values, and dweights (n, levels), from dy and what the forward pass made.
void hierarchical_backward(const float* const* q, const float* const* k, const float* values, const float* weights,
                           const float* y, const float* normaliser, const float* dy, float* const* dq, float* const* dk,
                           float* dvalues, float* dweights, int64_t n, int64_t heads, int64_t t, int64_t levels,
                           int64_t e, int64_t f, float scale, int64_t causal, int64_t threads) {
  parallel(n, threads, [=](int64_t begin, int64_t end, int64_t) {
    Head head(t, levels, e, std::min(kKeys, t));
    std::vector<Padded> gradients, products;
    for (int64_t l = 0; l < levels; ++l) {
      gradients.emplace_back(rows_of(kBlock, l), rows_of(std::min(kKeys, t), l));
      products.emplace_back(rows_of(kBlock, l), e);
    }
    for (int64_t at = begin; at < end; ++at) {
      const float* alpha = weights + at % heads * levels;
      head.take(q, k, at, alpha, scale);
      const Padded v = transpose_of(values + at * t * f, t, f, 1.0f);
      // Transposed, so that the small operand of their products is the one that is read across its rows.
      Padded dv(f, t);
      std::vector<Padded> rows_of_keys, dkeys;
      for (int64_t l = 0; l < levels; ++l) {
        rows_of_keys.push_back(copy_of(k[l] + at * rows_of(t, l) * e, rows_of(t, l), e));
        dkeys.emplace_back(e, rows_of(t, l));
        dweights[at * levels + l] = 0;
      }
      for (int64_t start = 0; start < t; start += kBlock) {
        const int64_t count = std::min(kBlock, t - start), seen = causal ? start + count : t;
        const int64_t stride = heads * f, here = place_of(at, start, heads, t, f);
        const float *grad = dy + here, *out = y + here;
        float carried[kBlock];
        for (int64_t i = 0; i < count; ++i) {
          carried[i] = 0;
          for (int64_t j = 0; j < f; ++j) carried[i] += out[i * stride + j] * grad[i * stride + j];
        }
        for (int64_t first = 0; first < seen; first += kKeys) {
          const int64_t last = std::min(seen, first + kKeys), columns = padded(last - first);
          head.make_scores(start, count, first, last);
          Padded &p = head.scores[0], &ds = gradients[0];
          multiply({grad, stride, 1}, v.row(0) + first, v.stride, ds.row(0), ds.stride, count, f, columns, false);
          for (int64_t i = 0; i < count; ++i) {
            const int64_t open = std::max<int64_t>(0, (causal ? std::min(last, start + i + 1) : last) - first);
            const float shift = normaliser[at * t + start + i], carry = carried[i];
            float *weight = p.row(i), *change = ds.row(i);
            for (int64_t j = 0; j < open; ++j) {
              weight[j] = exp_negative(weight[j] - shift);
              change[j] = weight[j] * (change[j] - carry);
            }
            std::fill(weight + open, weight + columns, 0.0f);
            std::fill(change + open, change + columns, 0.0f);
            // A row of every level whose cell is complete, while its rows are in the first cache level.
            for (int64_t l = 1; l < levels && ((i + 1) % (int64_t(1) << l) == 0 || i + 1 == count); ++l)
              gather_row(gradients[l - 1], gradients[l], i >> l, rows_of(count, l - 1),
                         padded(rows_of(last - first, l - 1)));
          }
          multiply({grad, 1, stride}, p.row(0), p.stride, dv.row(0) + first, dv.stride, f, count, columns, true);
          for (int64_t l = 0; l < levels; ++l) {
            const int64_t rows = rows_of(count, l), width = rows_of(last - first, l);
            const Padded &g = gradients[l], &own = rows_of_keys[l];
            Padded& product = products[l];
            multiply({g.row(0), g.stride, 1}, own.row(first >> l), own.stride, product.row(0), product.stride, rows,
                     width, padded(e), first > 0);
            multiply({head.queries_of(l, start), 1, e}, g.row(0), g.stride, dkeys[l].row(0) + (first >> l),
                     dkeys[l].stride, e, rows, padded(width), true);
          }
        }
        for (int64_t l = 0; l < levels; ++l) {
          const int64_t rows = rows_of(count, l), row = at * rows_of(t, l) + (start >> l);
          const float factor = alpha[l] * scale, *queries = head.queries_of(l, start);
          float sum = 0;
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < e; ++j) {
              const float product = products[l].row(i)[j];
              sum += product * queries[i * e + j];
              dq[l][(row + i) * e + j] = factor * product;
            }
          dweights[at * levels + l] += scale * sum;
        }
      }
      write_transposed(dv, t, 1.0f, dvalues + at * t * f);
      for (int64_t l = 0; l < levels; ++l)
        write_transposed(dkeys[l], rows_of(t, l), alpha[l] * scale, dk[l] + at * rows_of(t, l) * e);
    }
  });
}

}  // extern "C"
