// Norms that are a function of every number alone: gain f(alpha x + shift) + bias, f = tanh or erf.

#include "norms.h"

namespace {

template <class Function>
void backward(const float* x, const float* learned, const float* dy, const float* residual, float* dx, float* dlearned,
              int64_t rows, int64_t width, int64_t threads) {
  const PointwiseNorm<Function> norm{learned};
  NormGradients<PointwiseNorm<Function>> sums(threads, width);
  parallel(rows, threads, [=, &sums](int64_t begin, int64_t end, int64_t thread) {
    for (int64_t at = begin * width; at < end * width; at += width)
      if (residual)
        norm.template backward<true>(x + at, 0, dy + at, residual + at, dx + at, sums.of(thread), width);
      else
        norm.template backward<false>(x + at, 0, dy + at, residual, dx + at, sums.of(thread), width);
  });
  sums.total(dlearned);
}

template <class Function>
void forward(const float* x, const float* learned, float* y, int64_t rows, int64_t width, int64_t threads) {
  const PointwiseNorm<Function> norm{learned};
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t at = begin * width; at < end * width; at += width) norm.again(x + at, 0, y + at, width);
  });
}

}  // namespace

extern "C" {

// x, y (rows, width); learned (2 width + 2,): gain, bias, alpha, shift. kind: 1 tanh, 2 erf.
void pointwise_norm_forward(const float* x, const float* learned, float* y, int64_t rows, int64_t width, int64_t kind,
                            int64_t threads) {
  (kind == kErf ? forward<Erf> : forward<Tanh>)(x, learned, y, rows, width, threads);
}

// `residual` (rows, width) is added to dx where it is not null.
void pointwise_norm_backward(const float* x, const float* learned, const float* dy, const float* residual, float* dx,
                             float* dlearned, int64_t rows, int64_t width, int64_t kind, int64_t threads) {
  (kind == kErf ? backward<Erf> : backward<Tanh>)(x, learned, dy, residual, dx, dlearned, rows, width, threads);
}

}  // extern "C"
