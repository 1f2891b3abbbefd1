// Linear maps with matrices that stay in cache: y = x W^T + bias for many rows, and its gradients, a tile of rows at a
// time.
//
// Rows are shared evenly by the threads, and sums over rows are added in the order of the threads.

#include "elementwise.h"
#include "gemm.h"

namespace {

constexpr int64_t kTile = 48;

void add_row(const float* __restrict x, float* __restrict to, int64_t width) {
  for (int64_t j = 0; j < width; ++j) to[j] += x[j];
}

}  // namespace

extern "C" {

// x (rows, d), w (m, d), bias (m,) or null, y (rows, m).
void linear_forward(const float* x, const float* w, const float* bias, float* y, int64_t rows, int64_t d, int64_t m,
                    int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    const Padded transposed = transpose_of(w, m, d);
    Tile out(m, m, padded(m), kTile);
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t count = std::min(kTile, end - first);
      multiply({x + first * d, d, 1}, transposed.row(0), transposed.stride, out.place(y + first * m), out.stride(),
               count, d, padded(m), false);
      out.give(y + first * m, count);
      if (bias)
        for (int64_t i = first; i < first + count; ++i) add_row(bias, y + i * m, m);
    }
  });
}

// dx (rows, d), dw (m, d) and, where it is not null, dbias (m,) from dy (rows, m).
void linear_backward(const float* dy, const float* x, const float* w, float* dx, float* dw, float* dbias, int64_t rows,
                     int64_t d, int64_t m, int64_t threads) {
  const int64_t wide = stride_of(d);
  RowSums sums(threads, m * wide), bias_sums(threads, m);
  parallel(rows, threads, [=, &sums, &bias_sums](int64_t begin, int64_t end, int64_t thread) {
    const Padded matrix = copy_of(w, m, d);
    Tile in(d, d, padded(d), kTile), out(d, d, padded(d), kTile);
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t count = std::min(kTile, end - first);
      multiply({dy + first * m, m, 1}, matrix.row(0), matrix.stride, out.place(dx + first * d), out.stride(), count, m,
               padded(d), false);
      out.give(dx + first * d, count);
      multiply({dy + first * m, 1, m}, in.take(x + first * d, count), in.stride(), sums.of(thread), wide, m, count,
               padded(d), true);
      if (dbias)
        for (int64_t i = first; i < first + count; ++i) add_row(dy + i * m, bias_sums.of(thread), m);
    }
  });
  sums.total(dw, d, wide);
  if (dbias) bias_sums.total(dbias);
}

}  // extern "C"
