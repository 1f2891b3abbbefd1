// The norms before a layer, a row at a time: RMSNorm, and functions of every number alone.
//
// What a kernel that goes by rows is made of takes one of these, with the numbers it has learned in one array. `forward`
// normalises a row; `again` does so in a backward pass; `backward` makes the gradient of the row, plus `residual` where
// `add` holds, and adds those of what was learned to `NormSums`.
#pragma once

#include "elementwise.h"

namespace {

// Sums over the rows of one thread: of learned vectors, and of the two learned numbers, whose terms cancel, in float64.
struct NormSums {
  float* vectors;
  double* numbers;
};

// weight x / sqrt(mean(x^2) + eps). Learned: weight (d). inverse (rows,) is kept for the backward pass.
struct RmsNorm {
  const float* weight;
  float* inverse;
  float eps;

  static int64_t learned(int64_t d) { return d; }
  static int64_t vectors(int64_t d) { return d; }

  template <class T, class Y>
  void forward(const T* x, int64_t row, Y* y, int64_t d) const {
    inverse[row] = inverse_rms(x, d, eps);
    again(x, row, y, d);
  }
  template <class T, class Y>
  void again(const T* x, int64_t row, Y* y, int64_t d) const {
    scale_row(x, weight, inverse[row], y, d);
  }
  template <bool add, class T, class D>
  void backward(const T* x, int64_t row, const D* dy, const T* residual, T* dx, NormSums sums, int64_t d) const {
    rms_norm_backward_row<add>(x, weight, inverse[row], dy, residual, dx, sums.vectors, d);
  }
};

// 2^n and 2^f - 1 for x = n + f <= 0, |f| at most a half; below -126 x counts as -126. The polynomials here and below have
// the least largest relative error that their degree allows: 1.1e-8 for this one.
INLINE float power_of_two(float x, float* rest) {
  x = std::max(x, -126.0f);
  const float n = __builtin_rintf(x), f = x - n;
  float p = 1.5403510769829154e-4f;
  p = p * f + 1.3390735257416964e-3f;
  p = p * f + 9.618237614631653e-3f;
  p = p * f + 5.550357326865196e-2f;
  p = p * f + 0.24022649228572845f;
  p = p * f + 0.6931471824645996f;
  *rest = p * f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return power;
}

constexpr float kLog2E = 1.4426950408889634f;

// Functions: `value` to 2e-7 and 1e-6 of itself; `slope` of itself to 1e-5, with a value to 3e-7 for the sums of the gain.
//
// With m = exp(-2 |z|) - 1, tanh |z| = -m / (2 + m), which cancels nowhere; the slope is 4 e / (1 + e)^2, e = 1 + m.
struct Tanh {
  METHOD static float value(float z) {
    float rest;
    const float power = power_of_two(std::fabs(z) * (-2 * kLog2E), &rest);
    const float m = power == 1.0f ? rest : power * rest + (power - 1.0f);  // which the compiler may add up otherwise
    return std::copysign(m / (2.0f + m), z);
  }
  METHOD static float slope(float z, float* value) {
    float rest;
    const float power = power_of_two(std::fabs(z) * (-2 * kLog2E), &rest);
    const float e = power * rest + power, share = 1.0f / (1.0f + e);
    *value = std::copysign((1.0f - e) * share, z);
    return 4 * e * share * share;
  }
};

// From |z| = 1 on, erf |z| = 1 - 2^P(|z|), with an error of 1.5e-8 for this polynomial P; below, an odd one (4e-8). The
// slope is 2 / sqrt(pi) exp(-z^2), beside which erf is that of Abramowitz and Stegun 7.1.26 (1.5e-7).
struct Erf {
  METHOD static float value(float z) {
    const float size = std::min(std::fabs(z), 4.0f), square = z * z;
    float p = -0.0016597079811617732f;
    p = p * size + 0.021320318803191185f;
    p = p * size - 0.12787207961082458f;
    p = p * size - 0.9442279934883118f;
    p = p * size - 1.612122893333435f;
    p = p * size - 0.0038544536635901855f;
    float rest;
    const float power = power_of_two(p, &rest);
    const float large = std::copysign(1.0f - (power * rest + power), z);
    p = -0.0005631536478176713f;
    p = p * square + 0.004917582962661982f;
    p = p * square - 0.026711342856287956f;
    p = p * square + 0.11280181258916855f;
    p = p * square - 0.3761232793331146f;
    p = p * square + 1.1283791065216064f;
    return size < 1.0f ? z * p : large;
  }
  METHOD static float slope(float z, float* value) {
    const float size = std::fabs(z);
    float rest;
    const float power = power_of_two(z * z * -kLog2E, &rest);
    const float e = power * rest + power, u = 1.0f / (1.0f + 0.3275911f * size);
    float p = 1.061405429f;
    p = p * u - 1.453152027f;
    p = p * u + 1.421413741f;
    p = p * u - 0.284496736f;
    p = p * u + 0.254829592f;
    *value = std::copysign(1.0f - p * u * e, z);
    return 1.1283791670955126f * e;
  }
};

template <class Function, class T, class Y>
void pointwise_row(const T* __restrict x, const float* __restrict gain, const float* __restrict bias, float alpha,
                   float shift, Y* __restrict y, int64_t d) {
  for (int64_t j = 0; j < d; ++j) narrow(gain[j] * Function::value(alpha * widen(x[j]) + shift) + bias[j], &y[j]);
}

template <class Function, bool add, class T, class D>
void pointwise_backward_row(const T* __restrict x, const float* __restrict gain, float alpha, float shift,
                            const D* __restrict dy, const T* __restrict residual, T* __restrict dx,
                            float* __restrict dgain, float* __restrict dbias, double* numbers, int64_t d) {
  float by_x = 0, sum = 0;
  for (int64_t j = 0; j < d; ++j) {
    float value;
    const float change = widen(dy[j]) * gain[j] * Function::slope(alpha * widen(x[j]) + shift, &value);
    by_x += change * widen(x[j]);
    sum += change;
    dgain[j] += widen(dy[j]) * value;
    dbias[j] += widen(dy[j]);
    narrow(add ? widen(residual[j]) + alpha * change : alpha * change, &dx[j]);
  }
  numbers[0] += by_x;
  numbers[1] += sum;
}

// gain f(alpha x + shift) + bias. Learned: gain (d), bias (d), alpha, shift.
template <class Function>
struct PointwiseNorm {
  const float* numbers;

  static int64_t learned(int64_t d) { return 2 * d + 2; }
  static int64_t vectors(int64_t d) { return 2 * d; }

  template <class T, class Y>
  void forward(const T* x, int64_t row, Y* y, int64_t d) const {
    again(x, row, y, d);
  }
  template <class T, class Y>
  void again(const T* x, int64_t, Y* y, int64_t d) const {
    pointwise_row<Function>(x, numbers, numbers + d, numbers[2 * d], numbers[2 * d + 1], y, d);
  }
  template <bool add, class T, class D>
  void backward(const T* x, int64_t, const D* dy, const T* residual, T* dx, NormSums sums, int64_t d) const {
    pointwise_backward_row<Function, add>(x, numbers, numbers[2 * d], numbers[2 * d + 1], dy, residual, dx,
                                          sums.vectors, sums.vectors + d, sums.numbers, d);
  }
};

// The sums of all threads for a norm on rows of width d.
template <class Norm>
class NormGradients {
 public:
  NormGradients(int64_t threads, int64_t d) : d_(d), vectors_(threads, Norm::vectors(d)), numbers_(kApart * std::max<int64_t>(1, threads)) {}
  NormSums of(int64_t thread) { return {vectors_.of(thread), &numbers_[thread * kApart]}; }
  void total(float* out) const {
    vectors_.total(out);
    for (int64_t j = Norm::vectors(d_); j < Norm::learned(d_); ++j) {
      double sum = 0;
      for (size_t at = j - Norm::vectors(d_); at < numbers_.size(); at += kApart) sum += numbers_[at];
      out[j] = float(sum);
    }
  }

 private:
  static constexpr int64_t kApart = 16;  // numbers of two threads lie in no common cache line
  int64_t d_;
  RowSums vectors_;
  std::vector<double> numbers_;
};

enum NormKind : int64_t { kRms, kTanh, kErf };

// f(norm) for the norm of a kind.
template <class Function>
void with_norm(int64_t kind, const float* learned, float* inverse, float eps, Function f) {
  if (kind == kTanh)
    f(PointwiseNorm<Tanh>{learned});
  else if (kind == kErf)
    f(PointwiseNorm<Erf>{learned});
  else
    f(RmsNorm{learned, inverse, eps});
}

}  // namespace
