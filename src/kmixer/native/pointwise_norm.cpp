// Norms that are a function of every number alone: gain f(alpha x + shift) + bias, f = tanh or erf.

#include "norms.h"

namespace {

template <class Function, class T>
void backward(const T* x, const float* learned, const T* dy, const T* residual, T* dx, float* dlearned, int64_t rows,
              int64_t width, int64_t threads) {
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

template <class Function, class T>
void forward(const T* x, const float* learned, T* y, int64_t rows, int64_t width, int64_t threads) {
  const PointwiseNorm<Function> norm{learned};
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t at = begin * width; at < end * width; at += width) norm.again(x + at, 0, y + at, width);
  });
}

}  // namespace

extern "C" {

// x, y (rows, width), in bfloat16 (bf16 != 0) or float32; learned (2 width + 2,): gain, bias, alpha, shift. kind: 1 tanh,
// 2 erf.
void pointwise_norm_forward(const void* x, const float* learned, void* y, int64_t rows, int64_t width, int64_t kind,
                            int32_t bf16, int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    (kind == kErf ? forward<Erf, T> : forward<Tanh, T>)((const T*)x, learned, (T*)y, rows, width, threads);
  });
}

// `residual` (rows, width) is added to dx where it is not null.
void pointwise_norm_backward(const void* x, const float* learned, const void* dy, const void* residual, void* dx,
                             float* dlearned, int64_t rows, int64_t width, int64_t kind, int32_t bf16,
                             int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    (kind == kErf ? backward<Erf, T> : backward<Tanh, T>)((const T*)x, learned, (const T*)dy, (const T*)residual,
                                                          (T*)dx, dlearned, rows, width, threads);
  });
}

}  // extern "C"
