// What the compiled kernels share: threads, vectors of sixteen floats, and the normal distribution.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define INLINE static inline __attribute__((always_inline))

namespace {

// f(begin, end, thread) on contiguous parts of 0..count. With OpenMP the threads are torch's own: its
// runtime is loaded globally and comes first, and workers that torch left spinning are put to work.
template <class Function>
void parallel(int64_t count, int64_t threads, Function f) {
  threads = std::max<int64_t>(1, std::min(threads, count));
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t i = 0; i < threads; ++i) f(count * i / threads, count * (i + 1) / threads, i);
    return;
  }
#else
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i)
    others.emplace_back([=] { f(count * i / threads, count * (i + 1) / threads, i); });
  if (threads > 1) {
    f(0, count / threads, 0);
    for (auto& thread : others) thread.join();
    return;
  }
#endif
  f(0, count, 0);
}

// Sixteen floats: one AVX-512 register, two of AVX2; loads and stores need no alignment.
typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t kLanes = 16;

INLINE Vector load(const float* x) { return *(const Vector*)x; }
INLINE void store(Vector x, float* y) { *(Vector*)y = x; }

typedef float Quarter __attribute__((vector_size(16), aligned(4), may_alias));

// The sum of its four quarters.
INLINE Quarter quarters_of(Vector x) {
  typedef float Half __attribute__((vector_size(32)));
  const Half half = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
}

INLINE void store_sums(const Vector (&x)[1], float* to) {
  const Quarter quarter = quarters_of(x[0]);
  to[0] = (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

// Four sums at once, in half the shuffles of one after the other: pairs of vectors are interleaved and added
// until every quarter holds a part of all four.
INLINE void store_sums(const Vector (&x)[4], float* to) {
  Vector pair[2];
  for (int i = 0; i < 2; ++i) {
    const Vector a = x[2 * i], b = x[2 * i + 1];
    pair[i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
              __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  const Vector all =
      __builtin_shufflevector(pair[0], pair[1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
      __builtin_shufflevector(pair[0], pair[1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  *(Quarter*)to = quarters_of(all);
}

// e^x for x <= 0, to 2 units in the last place: 2^n times a polynomial of degree 6 on [-ln2/2, ln2/2].
INLINE float exp_negative(float x) {
  x = std::max(x, -87.0f);
  const float n = __builtin_rintf(x * 1.44269504f);
  const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

// Normal distribution function and density: erfc by Abramowitz and Stegun 7.1.26, error below 1.5e-7.
INLINE void normal(float x, float* distribution, float* density) {
  const float z = std::fabs(x) * 0.70710678f;
  const float e = exp_negative(-z * z);
  const float u = 1.0f / (1.0f + 0.3275911f * z);
  float p = 1.061405429f;
  p = p * u - 1.453152027f;
  p = p * u + 1.421413741f;
  p = p * u - 0.284496736f;
  p = p * u + 0.254829592f;
  const float tail = 0.5f * p * u * e;
  *distribution = x < 0 ? tail : 1.0f - tail;
  *density = 0.39894228f * e;
}

// 1 / sqrt(mean(x^2) + eps).
INLINE float inverse_rms(const float* x, int64_t width, float eps) {
  float sum = 0;
  for (int64_t j = 0; j < width; ++j) sum += x[j] * x[j];
  return 1.0f / std::sqrt(sum / width + eps);
}

}  // namespace
