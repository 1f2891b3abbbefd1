// Causal base kernels. Dense, y_i = sum_{j <= i} K[i, j] x_j for every channel: half of a matrix product, as strips
// of rows that end at the diagonal, with batch rows shared by the threads. And a filter, y_t = sum_l w_l x_{t-l}.

#include "elementwise.h"
#include "gemm.h"

namespace {

constexpr int64_t kStrip = 48;

// The lower triangle of K (t rows of `stride`), zeros above it, with the row stride of gemm.h.
std::vector<float> lower_triangle(const float* K, int64_t t, int64_t stride) {
  std::vector<float> lower(t * stride_of(t));
  for (int64_t i = 0; i < t; ++i) std::memcpy(&lower[i * stride_of(t)], K + i * stride, sizeof(float) * (i + 1));
  return lower;
}

// x (t, d) as (d, t), a block of both at a time.
INLINE void transpose(const float* x, float* to, int64_t t, int64_t d, int64_t to_row) {
  constexpr int64_t block = 16;
  for (int64_t first = 0; first < t; first += block)
    for (int64_t c = 0; c < d; c += block)
      for (int64_t j = c; j < std::min(d, c + block); ++j)
        for (int64_t i = first; i < std::min(t, first + block); ++i) to[j * to_row + i] = x[i * d + j];
}

// What `lags` lags of a filter give one position: out += w_l dy_l, dw_l += <in, dy_l>, where dy_l are rows of `d` that
// follow one another.
template <int lags, class T>
INLINE void filter_lags(const T* in, const T* dy, const float* w, float* out, double* dw, int64_t d) {
  Vector dot[lags] = {};
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes) {
    const Vector x = load(in + j);
    Vector sum = load(out + j);
    for (int l = 0; l < lags; ++l) {
      const Vector gradient = load(dy + l * d + j);
      sum += gradient * w[l];
      dot[l] += x * gradient;
    }
    store(sum, out + j);
  }
  float sums[lags];
  store_sums(dot, sums, false);
  for (; j < d; ++j)
    for (int l = 0; l < lags; ++l) {
      out[j] += widen(dy[l * d + j]) * w[l];
      sums[l] += widen(in[j]) * widen(dy[l * d + j]);
    }
  for (int l = 0; l < lags; ++l) dw[l] += sums[l];
}

template <class T>
void filter_forward(const T* x, const T* history, const float* w, T* y, int64_t b, int64_t t, int64_t d, int64_t lags,
                    bool add, int64_t threads) {
  parallel(b * t, threads, [=](int64_t begin, int64_t end, int64_t) {
    TileOf<T> tile(d, d, d, 1);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t batch = row / t, i = row % t;
      float* out = tile.begin(y + row * d, add);
      for (int64_t l = 0; l < lags; ++l) {
        const T* in = i >= l ? x + (row - l) * d : history + ((batch + 1) * (lags - 1) + i - l) * d;
        for (int64_t j = 0; j < d; ++j) out[j] += w[l] * widen(in[j]);
      }
      tile.give(y + row * d, 1);
    }
  });
}

template <class T>
void filter_backward(const T* x, const T* history, const float* w, const T* dy, T* dx, T* dhistory, double* dw,
                     int64_t b, int64_t t, int64_t d, int64_t lags, bool add, int64_t threads) {
  const int64_t past = lags - 1;
  parallel(b, threads, [=](int64_t begin, int64_t end, int64_t) {
    TileOf<T> tile(d, d, d, 1);
    for (int64_t batch = begin; batch < end; ++batch) {
      const T* gradient = dy + batch * t * d;
      std::fill(dw + batch * lags, dw + (batch + 1) * lags, 0.0);
      for (int64_t i = -past; i < t; ++i) {
        const T* in = i >= 0 ? x + (batch * t + i) * d : history + ((batch + 1) * past + i) * d;
        T* to = i >= 0 ? dx + (batch * t + i) * d : dhistory + ((batch + 1) * past + i) * d;
        float* out = tile.begin(to, add && i >= 0);
        const int64_t first = std::max<int64_t>(0, -i), count = std::min(lags, t - i) - first;
        in_groups(count, [&](int64_t c, auto size) __attribute__((always_inline)) {
          const int64_t l = first + c;
          filter_lags<size>(in, gradient + (i + l) * d, w + l, out, dw + batch * lags + l, d);
        });
        tile.give(to, 1);
      }
    }
  });
}

}  // namespace

extern "C" {

// x, y (b, t, d); K: the first t rows of `stride`, t columns used. d is a multiple of 16.
void dense_forward(const float* x, const float* K, float* y, int64_t b, int64_t t, int64_t d, int64_t stride,
                   int64_t threads) {
  parallel(b, threads, [=](int64_t begin, int64_t end, int64_t) {
    const std::vector<float> lower = lower_triangle(K, t, stride);
    const int64_t row = stride_of(t);
    for (int64_t batch = begin; batch < end; ++batch)
      for (int64_t i = 0; i < t; i += kStrip) {
        const int64_t count = std::min(kStrip, t - i), at = batch * t * d;
        multiply({&lower[i * row], row, 1}, x + at, d, y + at + i * d, d, count, i + count, d, false);
      }
  });
}

// dx (b, t, d) and dK, whose first t rows and columns are written, zeros above the diagonal.
void dense_backward(const float* x, const float* K, const float* dy, float* dx, float* dK, int64_t b, int64_t t,
                    int64_t d, int64_t stride, int64_t threads) {
  const int64_t row = stride_of(t);
  RowSums sums(threads, t * row);
  parallel(b, threads, [&](int64_t begin, int64_t end, int64_t thread) {
    const std::vector<float> lower = lower_triangle(K, t, stride);
    std::vector<float> transposed(d * row);
    for (int64_t batch = begin; batch < end; ++batch) {
      const float *in = x + batch * t * d, *gradient = dy + batch * t * d;
      transpose(in, transposed.data(), t, d, row);
      for (int64_t i = 0; i < t; i += kStrip) {
        const int64_t count = std::min(kStrip, t - i);
        multiply({&lower[i * row + i], 1, row}, gradient + i * d, d, dx + (batch * t + i) * d, d, count, t - i, d,
                 false);
        const int64_t columns = std::min(row, padded(i + count));
        multiply({gradient + i * d, d, 1}, transposed.data(), row, sums.of(thread) + i * row, row, count, d, columns,
                 true);
      }
    }
  });
  std::vector<float> total(t * t);
  sums.total(total.data(), t, row);
  for (int64_t i = 0; i < t; ++i)
    for (int64_t j = 0; j < t; ++j) dK[i * stride + j] = j <= i ? total[i * t + j] : 0.0f;
}

// Causal filter y_t = sum_l w_l x_{t-l}, or that added to y where `add` holds; x (b, t, d), history (b, lags - 1, d) are
// the inputs before x. They and y are bfloat16 where bf16 != 0, else float32.
void filter_forward(const void* x, const void* history, const float* w, void* y, int64_t b, int64_t t, int64_t d,
                    int64_t lags, int64_t add, int32_t bf16, int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    filter_forward((const T*)x, (const T*)history, w, (T*)y, b, t, d, lags, add, threads);
  });
}

// dx, to which it is added where `add` holds, dhistory, and dw as partial sums (b, lags).
void filter_backward(const void* x, const void* history, const float* w, const void* dy, void* dx, void* dhistory,
                     double* dw, int64_t b, int64_t t, int64_t d, int64_t lags, int64_t add, int32_t bf16,
                     int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    filter_backward((const T*)x, (const T*)history, w, (const T*)dy, (T*)dx, (T*)dhistory, dw, b, t, d, lags, add,
                    threads);
  });
}

}  // extern "C"
