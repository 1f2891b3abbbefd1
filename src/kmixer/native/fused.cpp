// The elementwise neighbours of the mixers: norms, GELU and gates, dropout.

#include "elementwise.h"

namespace {

template <class T>
void gelu_forward(const T* x, const float* bias, T* y, int64_t rows, int64_t width, Dropout dropout, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin * width; i < end * width; i += width)
      activation_row<Gelu>(x + i, bias, y + i, width, uint32_t(i), dropout);
  });
}

template <class T>
void gelu_backward(const T* x, const float* bias, const T* dy, T* dx, float* dbias, int64_t rows, int64_t width,
                   Dropout dropout, int64_t threads) {
  RowSums sums(threads, width);
  parallel(rows, threads, [=, &sums](int64_t begin, int64_t end, int64_t thread) {
    for (int64_t i = begin * width; i < end * width; i += width)
      activation_backward_row<Gelu, false>(x + i, bias, dy + i, dx + i, (T*)nullptr, sums.of(thread), width,
                                           uint32_t(i), dropout);
  });
  sums.total(dbias);
}

void gate(const float* __restrict x, const float* __restrict u, float* __restrict y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] * (u[i] * sigmoid(u[i]));
  int32_t infinite = 0;
  for (int64_t i = 0; i < count; ++i) infinite |= !(std::fabs(y[i]) <= 3.4028235e38f);
  if (!infinite) return;
  // The compiler may have taken (x u) first, which overflows where the result does not.
  for (int64_t i = 0; i < count; ++i) {
    const volatile float silu = u[i] * sigmoid(u[i]);
    y[i] = x[i] * silu;
  }
}

void gate_backward(const float* __restrict x, const float* __restrict u, const float* __restrict dy,
                   float* __restrict dx, float* __restrict du, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float s = sigmoid(u[i]);
    dx[i] = dy[i] * (u[i] * s);
    du[i] = dy[i] * x[i] * (s * (1.0f + u[i] * (1.0f - s)));
  }
  int32_t infinite = 0;
  for (int64_t i = 0; i < count; ++i)
    infinite |= !(std::fabs(dx[i]) <= 3.4028235e38f) | !(std::fabs(du[i]) <= 3.4028235e38f);
  if (!infinite) return;
  for (int64_t i = 0; i < count; ++i) {  // as in `gate`
    const float s = sigmoid(u[i]);
    const volatile float silu = u[i] * s, slope = s * (1.0f + u[i] * (1.0f - s)), change = dy[i] * x[i];
    dx[i] = dy[i] * silu;
    du[i] = change * slope;
  }
}

template <class T>
void add_forward(const float* __restrict residual, const T* __restrict x, const float* __restrict bias,
                 float* __restrict y, int64_t rows, int64_t width, Dropout dropout, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < width; ++j) {
        const int64_t at = i * width + j;
        const float mask = keep(uint32_t(at), dropout);
        y[at] = residual[at] + mask * (widen(x[at]) + bias[j]);
      }
  });
}

template <class T>
void add_backward(const float* __restrict dy, T* __restrict dx, float* dbias, int64_t rows, int64_t width,
                  Dropout dropout, int64_t threads) {
  RowSums sums(threads, width);
  parallel(rows, threads, [=, &sums](int64_t begin, int64_t end, int64_t thread) {
    float* __restrict sum = sums.of(thread);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < width; ++j) {
        const int64_t at = i * width + j;
        const float mask = keep(uint32_t(at), dropout);
        const float gradient = mask * dy[at];
        narrow(gradient, &dx[at]);
        sum[j] += gradient;
      }
  });
  sums.total(dbias);
}

}  // namespace

extern "C" {

// y = weight x / sqrt(mean(x^2) + eps) over rows of `width`; inverse (rows,) is kept for the backward.
void rms_norm_forward(const float* x, const float* weight, float* y, float* inverse, int64_t rows, int64_t width,
                      float eps, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin; i < end; ++i) {
      inverse[i] = inverse_rms(x + i * width, width, eps);
      scale_row(x + i * width, weight, inverse[i], y + i * width, width);
    }
  });
}

// `residual` (rows, width) is added to dx where it is not null.
void rms_norm_backward(const float* x, const float* weight, const float* inverse, const float* dy,
                       const float* residual, float* dx, float* dweight, int64_t rows, int64_t width, int64_t threads) {
  RowSums sums(threads, width);
  parallel(rows, threads, [=, &sums](int64_t begin, int64_t end, int64_t thread) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * width;
      if (residual)
        rms_norm_backward_row<true>(x + at, weight, inverse[i], dy + at, residual + at, dx + at, sums.of(thread),
                                    width);
      else
        rms_norm_backward_row<false>(x + at, weight, inverse[i], dy + at, residual, dx + at, sums.of(thread), width);
    }
  });
  sums.total(dweight);
}

// y = x / max(|x|, eps) over rows of `width`; inverse (rows,) is kept for the backward.
void normalize_forward(const float* x, float* y, float* inverse, int64_t rows, int64_t width, float eps,
                       int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = x + i * width;
      const float scale = inverse[i] = inverse_length(row, width, eps);
      for (int64_t j = 0; j < width; ++j) y[i * width + j] = row[j] * scale;
    }
  });
}

// Rows below eps were divided by a constant: only the first term is left of their gradient.
void normalize_backward(const float* y, const float* inverse, const float* dy, float* dx, int64_t rows, int64_t width,
                        float eps, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin; i < end; ++i) {
      const float *row = y + i * width, *gradient = dy + i * width;
      float sum = 0;
      for (int64_t j = 0; j < width; ++j) sum += gradient[j] * row[j];
      if (inverse[i] >= 1.0f / eps) sum = 0;
      for (int64_t j = 0; j < width; ++j) dx[i * width + j] = inverse[i] * (gradient[j] - row[j] * sum);
    }
  });
}

// y = x SiLU(u), element by element.
void silu_gate_forward(const float* x, const float* u, float* y, int64_t rows, int64_t width, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    gate(x + begin * width, u + begin * width, y + begin * width, (end - begin) * width);
  });
}

void silu_gate_backward(const float* x, const float* u, const float* dy, float* dx, float* du, int64_t rows,
                        int64_t width, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    gate_backward(x + begin * width, u + begin * width, dy + begin * width, dx + begin * width, du + begin * width,
                  (end - begin) * width);
  });
}

// y = dropout(x), and its own gradient.
void dropout(const float* x, float* y, int64_t rows, int64_t width, uint32_t seed, uint32_t threshold, float scale,
             int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin * width; i < end * width; ++i) y[i] = x[i] * keep(uint32_t(i), {seed, threshold, scale});
  });
}

// The elementwise kernels take x in float32, or in bfloat16 (bf16 != 0); rows (rows, width), bias (width,).
// Dropout: element i survives if a mix of seed and i is at or above `threshold`, and is scaled by `scale`.
void bias_gelu_dropout_forward(const void* x, const float* bias, void* y, int64_t rows, int64_t width, uint32_t seed,
                               uint32_t threshold, float scale, int32_t bf16, int64_t threads) {
  if (bf16)
    gelu_forward((const BFloat16*)x, bias, (BFloat16*)y, rows, width, {seed, threshold, scale}, threads);
  else
    gelu_forward((const float*)x, bias, (float*)y, rows, width, {seed, threshold, scale}, threads);
}

void bias_gelu_dropout_backward(const void* x, const float* bias, const void* dy, void* dx, float* dbias, int64_t rows,
                                int64_t width, uint32_t seed, uint32_t threshold, float scale, int32_t bf16,
                                int64_t threads) {
  if (bf16)
    gelu_backward((const BFloat16*)x, bias, (const BFloat16*)dy, (BFloat16*)dx, dbias, rows, width,
                  {seed, threshold, scale}, threads);
  else
    gelu_backward((const float*)x, bias, (const float*)dy, (float*)dx, dbias, rows, width, {seed, threshold, scale},
                  threads);
}

void bias_dropout_add_forward(const float* residual, const void* x, const float* bias, float* y, int64_t rows,
                              int64_t width, uint32_t seed, uint32_t threshold, float scale, int32_t bf16,
                              int64_t threads) {
  if (bf16)
    add_forward(residual, (const BFloat16*)x, bias, y, rows, width, {seed, threshold, scale}, threads);
  else
    add_forward(residual, (const float*)x, bias, y, rows, width, {seed, threshold, scale}, threads);
}

void bias_dropout_add_backward(const float* dy, void* dx, float* dbias, int64_t rows, int64_t width, uint32_t seed,
                               uint32_t threshold, float scale, int32_t bf16, int64_t threads) {
  if (bf16)
    add_backward(dy, (BFloat16*)dx, dbias, rows, width, {seed, threshold, scale}, threads);
  else
    add_backward(dy, (float*)dx, dbias, rows, width, {seed, threshold, scale}, threads);
}

}  // extern "C"
