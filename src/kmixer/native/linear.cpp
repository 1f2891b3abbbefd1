// Linear maps with matrices that stay in cache: x W^T + bias for many rows, or a residual and dropout of that, and their
// gradients, a tile of rows at a time.
//
// Rows are shared evenly by the threads, and sums over rows are added in the order of the threads.

#include "elementwise.h"
#include "pairs.h"

namespace {

constexpr int64_t kTile = 48;

template <class T>
void add_row(const T* __restrict x, float* __restrict to, int64_t width) {
  for (int64_t j = 0; j < width; ++j) to[j] += widen(x[j]);
}

// y = residual + dropout(x).
template <bool dropping, class T>
void add_to_row(const float* __restrict x, const T* __restrict residual, T* __restrict y, int64_t width, uint32_t start,
                Dropout dropout) {
  for (int64_t j = 0; j < width; ++j)
    narrow(widen(residual[j]) + keep<dropping>(start + uint32_t(j), dropout) * x[j], &y[j]);
}

template <class T>
void drop_row(const T* __restrict x, T* __restrict y, int64_t width, uint32_t start, Dropout dropout) {
  for (int64_t j = 0; j < width; ++j) narrow(widen(x[j]) * keep<true>(start + uint32_t(j), dropout), &y[j]);
}

template <class T>
void forward(const T* x, const float* w, const float* bias, const T* residual, T* y, int64_t rows, int64_t d, int64_t m,
             Dropout dropout, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    const auto matrix = inner_columns<T>(w, m, d);
    RowTile<T> in(kTile, d);
    TileOf<T> out(m, m, padded(m), kTile);
    Padded sums(residual ? kTile : 0, m);
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t count = std::min(kTile, end - first), stride = residual ? sums.stride : out.stride();
      float* to = residual ? sums.row(0) : out.place(y + first * m);
      in.take(x + first * d, count);
      multiply(in.along_columns(), matrix.row(0), matrix.stride, to, stride, count, d, padded(m), false);
      if (bias)
        for (int64_t i = 0; i < count; ++i) add_row(bias, to + i * stride, m);
      if (!residual) {
        out.give(y + first * m, count);
        continue;
      }
      with_dropping(dropout, [=](auto dropping) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t at = (first + i) * m;
          add_to_row<dropping>(to + i * stride, residual + at, y + at, m, uint32_t(at), dropout);
        }
      });
    }
  });
}

template <class T>
void backward(const T* dy, const T* x, const float* w, T* dx, float* dw, float* dbias, int64_t rows, int64_t d,
              int64_t m, Dropout dropout, int64_t threads) {
  const int64_t wide = stride_of(d);
  RowSums sums(threads, m * wide), bias_sums(threads, m);
  parallel(rows, threads, [=, &sums, &bias_sums](int64_t begin, int64_t end, int64_t thread) {
    const auto matrix = inner_rows<T>(w, m, d);
    RowTile<T> gradient(kTile, m), in(kTile, d);
    TileOf<T> out(d, d, padded(d), kTile);
    std::vector<T> dropped(dropout.threshold ? kTile * m : 0);
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t count = std::min(kTile, end - first);
      const T* rows_of_gradient = dy + first * m;
      if (dropout.threshold) {
        drop_row(rows_of_gradient, dropped.data(), count * m, uint32_t(first * m), dropout);
        rows_of_gradient = dropped.data();
      }
      gradient.take(rows_of_gradient, count);
      in.take(x + first * d, count);
      gradient.pair(count);
      in.pair(count);
      multiply(gradient.along_columns(), matrix.row(0), matrix.stride, out.place(dx + first * d), out.stride(), count,
               m, padded(d), false);
      out.give(dx + first * d, count);
      multiply(gradient.along_rows(), in.paired(), in.paired_stride(), sums.of(thread), wide, m, count, padded(d),
               true);
      if (dbias)
        for (int64_t i = 0; i < count; ++i) add_row(rows_of_gradient + i * m, bias_sums.of(thread), m);
    }
  });
  sums.total(dw, d, wide);
  if (dbias) bias_sums.total(dbias);
}

}  // namespace

extern "C" {

// y = x W^T + bias, or residual + dropout(x W^T + bias): x (rows, d), w (m, d), bias (m,) or null, residual (rows, m) or
// null, where nothing is dropped, y (rows, m). x, the residual and y are bfloat16 where bf16 != 0, else float32; w is
// rounded likewise.
void linear_forward(const void* x, const float* w, const float* bias, const void* residual, void* y, int64_t rows,
                    int64_t d, int64_t m, uint32_t seed, uint32_t threshold, float scale, int32_t bf16,
                    int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    forward((const T*)x, w, bias, (const T*)residual, (T*)y, rows, d, m, {seed, threshold, scale}, threads);
  });
}

// dx (rows, d), dw (m, d) and, where it is not null, dbias (m,) from dy (rows, m), which is the residual's gradient.
void linear_backward(const void* dy, const void* x, const float* w, void* dx, float* dw, float* dbias, int64_t rows,
                     int64_t d, int64_t m, uint32_t seed, uint32_t threshold, float scale, int32_t bf16,
                     int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    backward((const T*)dy, (const T*)x, w, (T*)dx, dw, dbias, rows, d, m, {seed, threshold, scale}, threads);
  });
}

}  // extern "C"
