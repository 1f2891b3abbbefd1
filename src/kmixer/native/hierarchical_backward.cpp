// The gradients of hierarchical attention. The scores are made again, a block of queries against a block of keys at a
// time. Rows of batch and heads are shared by the threads.

#include "hierarchical.h"

namespace {

// to (columns, rows) = factor times the first columns of `from` (rows, columns), transposed; sixteen columns a time, so
// that what is written stays in cache.
void write_transposed(const Padded& from, int64_t columns, float factor, float* to) {
  const int64_t rows = int64_t(from.data.size()) / from.stride;
  for (int64_t first = 0; first < columns; first += kPadding)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = first; j < std::min(first + kPadding, columns); ++j) to[j * rows + i] = factor * from.row(i)[j];
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

// What one thread needs for the gradients of one batch row and head.
class Backward {
 public:
  Backward(const Attention& attention, const AttentionGradients& gradients)
      : a(attention), out(gradients), head(a.t, a.levels, a.e, std::min(kKeys, a.t)), v(0, 0), dv(0, 0) {
    for (int64_t l = 0; l < a.levels; ++l) {
      changes.emplace_back(rows_of(kBlock, l), rows_of(std::min(kKeys, a.t), l));
      products.emplace_back(rows_of(kBlock, l), a.e);
    }
  }

  void run(int64_t row) {
    take(row);
    for (int64_t start = 0; start < a.t; start += kBlock) {
      const int64_t count = std::min(kBlock, a.t - start), seen = a.causal ? start + count : a.t;
      sum_outputs(start, count);
      for (int64_t first = 0; first < seen; first += kKeys) {
        const int64_t last = std::min(seen, first + kKeys);
        change_scores(start, count, first, last);
        add_products(start, count, first, last);
      }
      write_queries(start, count);
    }
    write_values_and_keys();
  }

 private:
  Attention a;
  AttentionGradients out;
  Head head;
  int64_t at = 0;
  const float* alpha = nullptr;    // the weights of the levels
  Padded v, dv;                    // transposed (f, t): the small operand of their products is read across its rows
  std::vector<Padded> keys, dkeys;  // of the levels (rows, e), and transposed (e, rows)
  std::vector<Padded> changes;     // gradients of a block of scores, by level
  std::vector<Padded> products;    // of these and the keys: gradients of the block's queries, before their factor
  float carried[kBlock];           // <y, dy> of the block's queries

  void take(int64_t row) {
    at = row;
    alpha = a.weights + at % a.heads * a.levels;
    head.take(a.q, a.k, at, alpha, a.scale);
    v = transpose_of(a.values + at * a.t * a.f, a.t, a.f, 1.0f);
    dv = Padded(a.f, a.t);
    keys.clear();
    dkeys.clear();
    for (int64_t l = 0; l < a.levels; ++l) {
      keys.push_back(copy_of(a.k[l] + at * rows_of(a.t, l) * a.e, rows_of(a.t, l), a.e));
      dkeys.emplace_back(a.e, rows_of(a.t, l));
      out.dweights[at * a.levels + l] = 0;
    }
  }

  Operand dy_of(int64_t start) const {
    return {out.dy + place_of(at, start, a.heads, a.t, a.f), a.heads * a.f, 1};
  }

  void sum_outputs(int64_t start, int64_t count) {
    const Operand dy = dy_of(start);
    const float* y = a.y + place_of(at, start, a.heads, a.t, a.f);
    for (int64_t i = 0; i < count; ++i) {
      float sum = 0;
      for (int64_t j = 0; j < a.f; ++j) sum += y[i * dy.row + j] * dy.data[i * dy.row + j];
      carried[i] = sum;
    }
  }

  // Weights in head.scores[0], and the gradients of the scores of every level in `changes`.
  void change_scores(int64_t start, int64_t count, int64_t first, int64_t last) {
    const int64_t columns = padded(last - first);
    head.make_scores(start, count, first, last);
    Padded &p = head.scores[0], &ds = changes[0];
    multiply(dy_of(start), v.row(0) + first, v.stride, ds.row(0), ds.stride, count, a.f, columns, false);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t query = at * a.t + start + i;
      const int64_t open = std::max<int64_t>(0, (a.causal ? std::min(last, start + i + 1) : last) - first);
      const float highest = a.highest[query], inverse = 1.0f / a.sums[query], carry = carried[i];
      float *weight = p.row(i), *change = ds.row(i);
      for (int64_t j = 0; j < open; ++j) {
        weight[j] = exp_negative(weight[j] - highest) * inverse;
        change[j] = weight[j] * (change[j] - carry);
      }
      std::fill(weight + open, weight + columns, 0.0f);
      std::fill(change + open, change + columns, 0.0f);
      // A row of every level whose cell is complete, while its rows are in the first cache level.
      for (int64_t l = 1; l < a.levels && ((i + 1) % (int64_t(1) << l) == 0 || i + 1 == count); ++l)
        gather_row(changes[l - 1], changes[l], i >> l, rows_of(count, l - 1), padded(rows_of(last - first, l - 1)));
    }
  }

  // What a block of queries and of keys adds to the gradients of values, queries and keys.
  void add_products(int64_t start, int64_t count, int64_t first, int64_t last) {
    const Operand dy = dy_of(start);
    const Padded& p = head.scores[0];
    multiply({dy.data, 1, dy.row}, p.row(0), p.stride, dv.row(0) + first, dv.stride, a.f, count, padded(last - first),
             true);
    for (int64_t l = 0; l < a.levels; ++l) {
      const int64_t rows = rows_of(count, l), width = rows_of(last - first, l);
      const Padded &change = changes[l], &own = keys[l];
      Padded& product = products[l];
      multiply({change.row(0), change.stride, 1}, own.row(first >> l), own.stride, product.row(0), product.stride, rows,
               width, padded(a.e), first > 0);
      multiply({head.queries_of(l, start), 1, a.e}, change.row(0), change.stride, dkeys[l].row(0) + (first >> l),
               dkeys[l].stride, a.e, rows, padded(width), true);
    }
  }

  void write_queries(int64_t start, int64_t count) {
    for (int64_t l = 0; l < a.levels; ++l) {
      const int64_t rows = rows_of(count, l), row = at * rows_of(a.t, l) + (start >> l);
      const float factor = alpha[l] * a.scale, *queries = head.queries_of(l, start);
      float* dq = out.dq[l] + row * a.e;
      float sum = 0;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < a.e; ++j) {
          const float product = products[l].row(i)[j];
          sum += product * queries[i * a.e + j];
          dq[i * a.e + j] = factor * product;
        }
      out.dweights[at * a.levels + l] += a.scale * sum;
    }
  }

  void write_values_and_keys() {
    write_transposed(dv, a.t, 1.0f, out.dvalues + at * a.t * a.f);
    for (int64_t l = 0; l < a.levels; ++l)
      write_transposed(dkeys[l], rows_of(a.t, l), alpha[l] * a.scale, out.dk[l] + at * rows_of(a.t, l) * a.e);
  }
};

}  // namespace

extern "C" {

int64_t attention_gradients_size() { return sizeof(AttentionGradients); }

void hierarchical_backward(const Attention* attention, const AttentionGradients* gradients, int64_t threads) {
  parallel(attention->n, threads, [=](int64_t begin, int64_t end, int64_t) {
    Backward backward(*attention, *gradients);
    for (int64_t row = begin; row < end; ++row) backward.run(row);
  });
}

}  // extern "C"
