// Cross-entropy of logits with an optional soft cap, cap tanh(x / cap), a row at a time.

#include "common.h"

namespace {

INLINE float hyperbolic_tangent(float x) {
  const float e = exp_negative(-2 * std::fabs(x));
  return std::copysign((1.0f - e) / (1.0f + e), x);
}

struct Uncapped {
  INLINE float at(float x, float, float* slope) {
    *slope = 1;
    return x;
  }
};

struct Capped {
  INLINE float at(float x, float cap, float* slope) {
    const float t = hyperbolic_tangent(x / cap);
    *slope = 1 - t * t;
    return cap * t;
  }
};

template <class Cap>
float log_sum_exp(const float* __restrict x, int64_t width, float cap) {
  float slope, sum = 0;
  const float largest = Cap::at(highest_of(x, width), cap, &slope);
  for (int64_t j = 0; j < width; ++j) sum += exp_negative(Cap::at(x[j], cap, &slope) - largest);
  return largest + std::log(sum);
}

template <class Cap>
void forward(const float* x, const int64_t* targets, float cap, float* losses, float* log_sums, int64_t rows,
             int64_t width, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin; i < end; ++i) {
      float slope;
      log_sums[i] = log_sum_exp<Cap>(x + i * width, width, cap);
      losses[i] = log_sums[i] - Cap::at(x[i * width + targets[i]], cap, &slope);
    }
  });
}

template <class Cap>
void backward_row(const float* __restrict x, int64_t target, float cap, float log_sum, float dloss,
                  float* __restrict dx, int64_t width) {
  float slope;
  for (int64_t j = 0; j < width; ++j) {
    const float probability = exp_negative(Cap::at(x[j], cap, &slope) - log_sum);
    dx[j] = dloss * probability * slope;
  }
  Cap::at(x[target], cap, &slope);
  dx[target] -= dloss * slope;
}

template <class Cap>
void backward(const float* x, const int64_t* targets, float cap, const float* log_sums, const float* dlosses, float* dx,
              int64_t rows, int64_t width, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin; i < end; ++i)
      backward_row<Cap>(x + i * width, targets[i], cap, log_sums[i], dlosses[i], dx + i * width, width);
  });
}

}  // namespace

extern "C" {

// x (rows, width), targets (rows,) in 0..width - 1, losses (rows,); log_sums (rows,) is kept for the backward. A cap of
// 0 is none.
void cross_entropy_forward(const float* x, const int64_t* targets, float* losses, float* log_sums, int64_t rows,
                           int64_t width, float cap, int64_t threads) {
  (cap > 0 ? forward<Capped> : forward<Uncapped>)(x, targets, cap, losses, log_sums, rows, width, threads);
}

void cross_entropy_backward(const float* x, const int64_t* targets, const float* log_sums, const float* dlosses,
                            float* dx, int64_t rows, int64_t width, float cap, int64_t threads) {
  (cap > 0 ? backward<Capped> : backward<Uncapped>)(x, targets, cap, log_sums, dlosses, dx, rows, width, threads);
}

}  // extern "C"
