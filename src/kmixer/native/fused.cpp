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

template <class T>
void gate(const T* __restrict x, const T* __restrict u, T* __restrict y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow(widen(x[i]) * (widen(u[i]) * sigmoid(widen(u[i]))), &y[i]);
  int32_t infinite = 0;
  for (int64_t i = 0; i < count; ++i) infinite |= !(std::fabs(widen(y[i])) <= 3.4028235e38f);
  if (!infinite) return;
  // The compiler may have taken (x u) first, which overflows where the result does not.
  for (int64_t i = 0; i < count; ++i) {
    const volatile float silu = widen(u[i]) * sigmoid(widen(u[i]));
    narrow(widen(x[i]) * silu, &y[i]);
  }
}

template <class T>
void gate_backward(const T* __restrict x, const T* __restrict u, const T* __restrict dy, T* __restrict dx,
                   T* __restrict du, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float gate = widen(u[i]), s = sigmoid(gate);
    narrow(widen(dy[i]) * (gate * s), &dx[i]);
    narrow(widen(dy[i]) * widen(x[i]) * (s * (1.0f + gate * (1.0f - s))), &du[i]);
  }
  int32_t infinite = 0;
  for (int64_t i = 0; i < count; ++i)
    infinite |= !(std::fabs(widen(dx[i])) <= 3.4028235e38f) | !(std::fabs(widen(du[i])) <= 3.4028235e38f);
  if (!infinite) return;
  for (int64_t i = 0; i < count; ++i) {  // as in `gate`
    const float gate = widen(u[i]), s = sigmoid(gate);
    const volatile float silu = gate * s, slope = s * (1.0f + gate * (1.0f - s)),
                         change = widen(dy[i]) * widen(x[i]);
    narrow(widen(dy[i]) * silu, &dx[i]);
    narrow(change * slope, &du[i]);
  }
}

template <bool dropping, class T>
void add_row(const T* __restrict residual, const T* __restrict x, const float* __restrict bias, T* __restrict y,
             int64_t width, uint32_t start, Dropout dropout) {
  for (int64_t j = 0; j < width; ++j) {
    const float mask = keep<dropping>(start + uint32_t(j), dropout);
    narrow(widen(residual[j]) + mask * (widen(x[j]) + bias[j]), &y[j]);
  }
}

template <bool dropping, class T>
void add_backward_row(const T* __restrict dy, T* __restrict dx, float* __restrict sum, int64_t width, uint32_t start,
                      Dropout dropout) {
  for (int64_t j = 0; j < width; ++j) {
    const float gradient = keep<dropping>(start + uint32_t(j), dropout) * widen(dy[j]);
    if (dropping) narrow(gradient, &dx[j]);
    sum[j] += gradient;
  }
}

template <class T>
void add_forward(const T* residual, const T* x, const float* bias, T* y, int64_t rows, int64_t width, Dropout dropout,
                 int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    with_dropping(dropout, [=](auto dropping) {
      for (int64_t at = begin * width; at < end * width; at += width)
        add_row<dropping>(residual + at, x + at, bias, y + at, width, uint32_t(at), dropout);
    });
  });
}

template <class T>
void add_backward(const T* dy, T* dx, float* dbias, int64_t rows, int64_t width, Dropout dropout, int64_t threads) {
  RowSums sums(threads, width);
  parallel(rows, threads, [=, &sums](int64_t begin, int64_t end, int64_t thread) {
    float* sum = sums.of(thread);
    with_dropping(dropout, [=](auto dropping) {
      for (int64_t at = begin * width; at < end * width; at += width)
        add_backward_row<dropping>(dy + at, dropping ? dx + at : nullptr, sum, width, uint32_t(at), dropout);
    });
  });
  sums.total(dbias);
}

template <class T>
void rms_norm_backward(const T* x, const float* weight, const float* inverse, const T* dy, const T* residual, T* dx,
                       float* dweight, int64_t rows, int64_t width, int64_t threads) {
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

}  // namespace

extern "C" {

// What elementwise kernels read and write for the rows (rows, width) of a layer is float32, or bfloat16 where bf16 != 0;
// what they have learned is float32.

// y = weight x / sqrt(mean(x^2) + eps) over rows of `width`; inverse (rows,) is kept for the backward.
void rms_norm_forward(const void* x, const float* weight, void* y, float* inverse, int64_t rows, int64_t width,
                      float eps, int32_t bf16, int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
      for (int64_t i = begin; i < end; ++i) {
        const T* row = (const T*)x + i * width;
        inverse[i] = inverse_rms(row, width, eps);
        scale_row(row, weight, inverse[i], (T*)y + i * width, width);
      }
    });
  });
}

// `residual` (rows, width) is added to dx where it is not null.
void rms_norm_backward(const void* x, const float* weight, const float* inverse, const void* dy, const void* residual,
                       void* dx, float* dweight, int64_t rows, int64_t width, int32_t bf16, int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    rms_norm_backward((const T*)x, weight, inverse, (const T*)dy, (const T*)residual, (T*)dx, dweight, rows, width,
                      threads);
  });
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
void silu_gate_forward(const void* x, const void* u, void* y, int64_t rows, int64_t width, int32_t bf16,
                       int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
      const int64_t at = begin * width;
      gate((const T*)x + at, (const T*)u + at, (T*)y + at, (end - begin) * width);
    });
  });
}

void silu_gate_backward(const void* x, const void* u, const void* dy, void* dx, void* du, int64_t rows, int64_t width,
                        int32_t bf16, int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
      const int64_t at = begin * width;
      gate_backward((const T*)x + at, (const T*)u + at, (const T*)dy + at, (T*)dx + at, (T*)du + at,
                    (end - begin) * width);
    });
  });
}

// Dropout: element i survives if a mix of seed and i is at or above `threshold`, and is scaled by `scale`.

// y = dropout(x), and its own gradient.
void dropout(const void* x, void* y, int64_t rows, int64_t width, uint32_t seed, uint32_t threshold, float scale,
             int32_t bf16, int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
      for (int64_t i = begin * width; i < end * width; ++i)
        narrow(widen(((const T*)x)[i]) * keep<true>(uint32_t(i), {seed, threshold, scale}), (T*)y + i);
    });
  });
}

void bias_gelu_dropout_forward(const void* x, const float* bias, void* y, int64_t rows, int64_t width, uint32_t seed,
                               uint32_t threshold, float scale, int32_t bf16, int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    gelu_forward((const T*)x, bias, (T*)y, rows, width, {seed, threshold, scale}, threads);
  });
}

void bias_gelu_dropout_backward(const void* x, const float* bias, const void* dy, void* dx, float* dbias, int64_t rows,
                                int64_t width, uint32_t seed, uint32_t threshold, float scale, int32_t bf16,
                                int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    gelu_backward((const T*)x, bias, (const T*)dy, (T*)dx, dbias, rows, width, {seed, threshold, scale}, threads);
  });
}

// y = residual + dropout(x + bias).
void bias_dropout_add_forward(const void* residual, const void* x, const float* bias, void* y, int64_t rows,
                              int64_t width, uint32_t seed, uint32_t threshold, float scale, int32_t bf16,
                              int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    add_forward((const T*)residual, (const T*)x, bias, (T*)y, rows, width, {seed, threshold, scale}, threads);
  });
}

// dx may be null where nothing is dropped: it is dy.
void bias_dropout_add_backward(const void* dy, void* dx, float* dbias, int64_t rows, int64_t width, uint32_t seed,
                               uint32_t threshold, float scale, int32_t bf16, int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    add_backward((const T*)dy, (T*)dx, dbias, rows, width, {seed, threshold, scale}, threads);
  });
}

}  // extern "C"
