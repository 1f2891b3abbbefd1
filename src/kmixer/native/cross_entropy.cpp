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

// The highest number of a row under the cap, and the sum of e^(x - highest). Both are kept apart: their sum
// highest + log(sum) would be rounded to the digits of the highest, and the losses would follow a shift of all logits.
template <class Cap>
float sum_of_row(const float* __restrict x, int64_t width, float cap, float* highest) {
  float slope, sum = 0;
  const float largest = Cap::at(highest_of(x, width), cap, &slope);
  for (int64_t j = 0; j < width; ++j) sum += exp_negative(Cap::at(x[j], cap, &slope) - largest);
  *highest = largest;
  return sum;
}

template <class Cap>
void forward(const float* x, const int64_t* targets, float cap, float* losses, float* highest, float* sums,
             int64_t rows, int64_t width, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin; i < end; ++i) {
      float slope;
      sums[i] = sum_of_row<Cap>(x + i * width, width, cap, highest + i);
      losses[i] = std::log(sums[i]) - AS_WRITTEN(Cap::at(x[i * width + targets[i]], cap, &slope) - highest[i]);
    }
  });
}

template <class Cap>
void backward_row(const float* __restrict x, int64_t target, float cap, float highest, float sum, float dloss,
                  float* __restrict dx, int64_t width) {
  float slope;
  const float inverse = 1.0f / sum;
  for (int64_t j = 0; j < width; ++j) {
    const float probability = exp_negative(Cap::at(x[j], cap, &slope) - highest) * inverse;
    dx[j] = dloss * probability * slope;
  }
  Cap::at(x[target], cap, &slope);
  dx[target] -= dloss * slope;
}

template <class Cap>
void backward(const float* x, const int64_t* targets, float cap, const float* highest, const float* sums,
              const float* dlosses, float* dx, int64_t rows, int64_t width, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin; i < end; ++i)
      backward_row<Cap>(x + i * width, targets[i], cap, highest[i], sums[i], dlosses[i], dx + i * width, width);
  });
}

}  // namespace

extern "C" {

// x (rows, width), targets (rows,) in 0..width - 1, losses (rows,); highest and sums (rows,) are kept for the backward. A
// cap of 0 is none.
void cross_entropy_forward(const float* x, const int64_t* targets, float* losses, float* highest, float* sums,
                           int64_t rows, int64_t width, float cap, int64_t threads) {
  (cap > 0 ? forward<Capped> : forward<Uncapped>)(x, targets, cap, losses, highest, sums, rows, width, threads);
}

void cross_entropy_backward(const float* x, const int64_t* targets, const float* highest, const float* sums,
                            const float* dlosses, float* dx, int64_t rows, int64_t width, float cap, int64_t threads) {
  (cap > 0 ? backward<Capped> : backward<Uncapped>)(x, targets, cap, highest, sums, dlosses, dx, rows, width, threads);
}

}  // extern "C"
