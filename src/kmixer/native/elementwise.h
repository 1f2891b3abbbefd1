// What elementwise kernels share: dropout, activations, and sums over rows.
#pragma once

#include "common.h"

namespace {

// Dropout of a whole tensor: element `index` survives if a 32-bit mix of it with the seed (lowbias32 by
// Ellis, two rounds of multiply and shift) is at or above the threshold, and is multiplied by `scale`.
struct Dropout {
  uint32_t seed, threshold;
  float scale;
};

// f with whether anything is dropped: the mix costs as much as an activation.
template <class Function>
INLINE void with_dropping(Dropout dropout, Function f) {
  if (dropout.threshold)
    f(std::true_type{});
  else
    f(std::false_type{});
}

template <bool dropping>
INLINE float keep(uint32_t index, Dropout dropout) {
  if constexpr (!dropping) return 1.0f;
  uint32_t x = index ^ dropout.seed;
  x ^= x >> 16;
  x *= 0x7feb352dU;
  x ^= x >> 15;
  x *= 0x846ca68bU;
  x ^= x >> 16;
  return x < dropout.threshold ? 0.0f : dropout.scale;
}

// Activations: their value at u, and their slope.
struct Gelu {
  INLINE float at(float u, float* slope) {
    float distribution, density;
    normal(u, &distribution, &density);
    *slope = distribution + u * density;
    return u * distribution;
  }
};

struct SquaredRelu {
  INLINE float at(float u, float* slope) {
    const float positive = u < 0 ? 0.0f : u;  // NaN stays NaN
    *slope = 2 * positive;
    return positive * positive;
  }
};

// Loops over a row stand in functions of their own, where the compiler takes __restrict at its word.
// `start` is the index of the row's first element.

template <class Activation, bool dropping, class T>
void activation_row_of(const T* __restrict x, const float* __restrict bias, T* __restrict y, int64_t width,
                       uint32_t start, Dropout dropout) {
  for (int64_t j = 0; j < width; ++j) {
    float slope;
    narrow(Activation::at(widen(x[j]) + bias[j], &slope) * keep<dropping>(start + uint32_t(j), dropout), &y[j]);
  }
}

// y = dropout(activation(x + bias)).
template <class Activation, class T>
void activation_row(const T* x, const float* bias, T* y, int64_t width, uint32_t start, Dropout dropout) {
  with_dropping(dropout, [=](auto dropping) {
    activation_row_of<Activation, dropping>(x, bias, y, width, start, dropout);
  });
}

template <class Activation, bool again, bool dropping, class T, class D>
void activation_backward_row_of(const T* __restrict x, const float* __restrict bias, const D* __restrict dy,
                                T* __restrict dx, T* __restrict y, float* __restrict sum, int64_t width,
                                uint32_t start, Dropout dropout) {
  for (int64_t j = 0; j < width; ++j) {
    const float mask = keep<dropping>(start + uint32_t(j), dropout);
    float slope;
    const float value = Activation::at(widen(x[j]) + bias[j], &slope);
    const float gradient = widen(dy[j]) * mask * slope;
    if (again) narrow(value * mask, &y[j]);
    narrow(gradient, &dx[j]);
    sum[j] += gradient;
  }
}

// dx from dy; adds dx to sum. Writes y once more where `again` holds.
template <class Activation, bool again, class T, class D>
void activation_backward_row(const T* x, const float* bias, const D* dy, T* dx, T* y, float* sum, int64_t width,
                             uint32_t start, Dropout dropout) {
  with_dropping(dropout, [=](auto dropping) {
    activation_backward_row_of<Activation, again, dropping>(x, bias, dy, dx, y, sum, width, start, dropout);
  });
}

// y = weight x inverse, the second half of RMSNorm.
template <class T, class Y>
void scale_row(const T* __restrict x, const float* __restrict weight, float inverse, Y* __restrict y, int64_t width) {
  for (int64_t j = 0; j < width; ++j) narrow(weight[j] * (widen(x[j]) * inverse), &y[j]);
}

// Gradient dx of RMSNorm from dy, plus `residual` where `add` holds; adds the gradient of the weight to sum.
template <bool add, class T, class D>
void rms_norm_backward_row(const T* __restrict x, const float* __restrict weight, float inverse,
                           const D* __restrict dy, const T* __restrict residual, T* __restrict dx,
                           float* __restrict sum, int64_t width) {
  float dot = 0;
  for (int64_t j = 0; j < width; ++j) {
    dot += widen(dy[j]) * weight[j] * widen(x[j]);
    sum[j] += widen(dy[j]) * widen(x[j]) * inverse;
  }
  const float shared = dot * inverse * inverse / width;
  for (int64_t j = 0; j < width; ++j) {
    const float gradient = inverse * (widen(dy[j]) * weight[j] - widen(x[j]) * shared);
    narrow(add ? widen(residual[j]) + gradient : gradient, &dx[j]);
  }
}

// Sums over rows of `width`, one for each thread, far enough apart that no two share a cache line.
class RowSums {
 public:
  RowSums(int64_t threads, int64_t width)
      : threads_(std::max<int64_t>(1, threads)), width_(width), stride_(width + 64), sums_(threads_ * stride_) {}
  float* of(int64_t thread) { return sums_.data() + thread * stride_; }
  // One of the sums.
  float at(int64_t j) const {
    float sum = 0;
    for (int64_t i = 0; i < threads_; ++i) sum += sums_[i * stride_ + j];
    return sum;
  }
  void total(float* out) const { total(out, width_, width_); }
  // The same for a matrix with rows of `columns`, which the sums hold with a longer row stride.
  void total(float* out, int64_t columns, int64_t stride) const {
    for (int64_t at = 0; at < width_; at += stride)
      for (int64_t j = 0; j < columns; ++j, ++out) {
        *out = 0;
        for (int64_t i = 0; i < threads_; ++i) *out += sums_[i * stride_ + at + j];
      }
  }

 private:
  int64_t threads_, width_, stride_;
  std::vector<float> sums_;
};

}  // namespace
