// What elementwise kernels share: bfloat16, dropout, and sums over rows.
#pragma once

#include "common.h"

namespace {

struct BFloat16 {
  uint16_t bits;
};

INLINE float widen(float x) { return x; }
INLINE float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
INLINE void narrow(float x, float* y) { *y = x; }
INLINE void narrow(float x, BFloat16* y) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  y->bits = uint16_t(x == x ? rounded : 0x7fc0);
}

// Dropout of a whole tensor: element `index` survives if a 32-bit mix of it with the seed (lowbias32 by
// Ellis, two rounds of multiply and shift) is at or above the threshold, and is multiplied by `scale`.
struct Dropout {
  uint32_t seed, threshold;
  float scale;
};

INLINE float keep(uint32_t index, Dropout dropout) {
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

// y = dropout(activation(x + bias)).
template <class Activation, class T>
void activation_row(const T* __restrict x, const float* __restrict bias, T* __restrict y, int64_t width, uint32_t start,
                    Dropout dropout) {
  for (int64_t j = 0; j < width; ++j) {
    float slope;
    narrow(Activation::at(widen(x[j]) + bias[j], &slope) * keep(start + uint32_t(j), dropout), &y[j]);
  }
}

// dx from dy; adds dx to sum. Writes y once more where `again` holds.
template <class Activation, bool again, class T>
void activation_backward_row(const T* __restrict x, const float* __restrict bias, const T* __restrict dy,
                             T* __restrict dx, T* __restrict y, float* __restrict sum, int64_t width, uint32_t start,
                             Dropout dropout) {
  for (int64_t j = 0; j < width; ++j) {
    const float mask = keep(start + uint32_t(j), dropout);
    float slope;
    const float value = Activation::at(widen(x[j]) + bias[j], &slope);
    const float gradient = widen(dy[j]) * mask * slope;
    if (again) narrow(value * mask, &y[j]);
    narrow(gradient, &dx[j]);
    sum[j] += gradient;
  }
}

// y = weight x inverse, the second half of RMSNorm.
inline void scale_row(const float* __restrict x, const float* __restrict weight, float inverse, float* __restrict y,
                      int64_t width) {
  for (int64_t j = 0; j < width; ++j) y[j] = weight[j] * (x[j] * inverse);
}

// Gradient dx of RMSNorm from dy, plus `residual` where `add` holds; adds the gradient of the weight to sum.
template <bool add>
void rms_norm_backward_row(const float* __restrict x, const float* __restrict weight, float inverse,
                           const float* __restrict dy, const float* __restrict residual, float* __restrict dx,
                           float* __restrict sum, int64_t width) {
  float dot = 0;
  for (int64_t j = 0; j < width; ++j) {
    dot += dy[j] * weight[j] * x[j];
    sum[j] += dy[j] * x[j] * inverse;
  }
  const float shared = dot * inverse * inverse / width;
  for (int64_t j = 0; j < width; ++j) {
    const float gradient = inverse * (dy[j] * weight[j] - x[j] * shared);
    dx[j] = add ? residual[j] + gradient : gradient;
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
