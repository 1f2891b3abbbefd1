// Compiled kernels for float32, and bfloat16 between layers, on a CPU. Plain C interface: pointers, sizes, and a number of threads.
//
// Every file is built for AVX-512 with and without products of bfloat16, for AVX2 and for any processor; native/library.py
// loads the build that the machine can run. Loops are written so that the compiler makes vectors of them. Every kernel
// has its definition in Python, in ops/ or layers/, and is tested against it. Sums over rows are made per thread and added
// in the order of the threads: the same number of threads gives the same bits.
//
// This file is what they share: vectors of floats, and functions of one number; threads.h has the threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "bfloat16.h"
#include "threads.h"

#define INLINE static inline __attribute__((always_inline))
#define METHOD inline __attribute__((always_inline))  // the same inside a struct

namespace {

// Calls f with the first number of a group of 0..r - 1 and the group's size, four or one.
template <class Function>
INLINE void in_groups(int64_t r, Function f) {
  int64_t c = 0;
  for (; c + 4 <= r; c += 4) f(c, std::integral_constant<int, 4>());
  for (; c < r; ++c) f(c, std::integral_constant<int, 1>());
}

// One register of floats; loads and stores need no alignment. A vector wider than a register would be kept in memory.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

INLINE Vector load(const float* x) { return *(const Vector*)x; }
INLINE void store(Vector x, float* y) { *(Vector*)y = x; }

// Of numbers of 16 bits.
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

INLINE Vector load(const BFloat16* x) { return (Vector)(__builtin_convertvector(*(const HalfBits*)x, Bits) << 16); }

INLINE float highest_of(const float* x, int64_t count) {
  int64_t j = 0;
  float highest = x[0];
  if (count >= kLanes) {
    Vector lanes = load(x);
    for (j = kLanes; j + kLanes <= count; j += kLanes) {
      const Vector next = load(x + j);
      lanes = next > lanes ? next : lanes;
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) highest = std::max(highest, lanes[lane]);
  }
  for (; j < count; ++j) highest = std::max(highest, x[j]);
  return highest;
}

typedef float Quarter __attribute__((vector_size(16), aligned(4), may_alias));

// The sum of a vector's groups of four.
INLINE Quarter quarters_of(Vector x) {
#if defined(__AVX512F__)
  typedef float Half __attribute__((vector_size(32)));
  const Half half = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif defined(__AVX__)
  return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
#else
  return x;
#endif
}

// Of every group of four: the first two of a and b in turn and the last two, or the first pair of both and the last.
#if defined(__AVX512F__)
#define FIRST_IN_TURN(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define LAST_IN_TURN(a, b) __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define FIRST_PAIRS(a, b) __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define LAST_PAIRS(a, b) __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#elif defined(__AVX__)
#define FIRST_IN_TURN(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define LAST_IN_TURN(a, b) __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define FIRST_PAIRS(a, b) __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define LAST_PAIRS(a, b) __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#else
#define FIRST_IN_TURN(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define LAST_IN_TURN(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define FIRST_PAIRS(a, b) __builtin_shufflevector(a, b, 0, 1, 4, 5)
#define LAST_PAIRS(a, b) __builtin_shufflevector(a, b, 2, 3, 6, 7)
#endif

// The sums of the vectors, written to `to` or added to it.
INLINE void store_sums(const Vector (&x)[1], float* to, bool add) {
  const Quarter quarter = quarters_of(x[0]);
  const float sum = (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
  to[0] = add ? to[0] + sum : sum;
}

// Four sums at once, in half the shuffles of one after the other: pairs of vectors are interleaved and added
// until every quarter holds a part of all four.
INLINE void store_sums(const Vector (&x)[4], float* to, bool add) {
  const Vector first = FIRST_IN_TURN(x[0], x[1]) + LAST_IN_TURN(x[0], x[1]);
  const Vector second = FIRST_IN_TURN(x[2], x[3]) + LAST_IN_TURN(x[2], x[3]);
  const Quarter sums = quarters_of(FIRST_PAIRS(first, second) + LAST_PAIRS(first, second));
  *(Quarter*)to = add ? *(Quarter*)to + sums : sums;
}

// What stands inside is computed as it is written: the compiler may reorder sums and products, but none with this one.
// For single numbers: in a loop that becomes vectors, GCC 12 forgets it.
#if defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
#define AS_WRITTEN(x) __builtin_assoc_barrier(x)
#elif __has_builtin(__arithmetic_fence)
#define AS_WRITTEN(x) __arithmetic_fence(x)
#endif
#endif
#ifndef AS_WRITTEN
#define AS_WRITTEN(x) (x)
#endif

// e^x for x <= 0, to 2 units in the last place: 2^n times a polynomial of degree 6 on [-ln2/2, ln2/2]. From
// x = -87.7 on, where e^x leaves the range of normal numbers, n is -127 and the power of two is 0.
INLINE float exp_negative(float x) {
  x = std::max(x, -88.0f);
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

INLINE float sigmoid(float x) {
  const float e = exp_negative(-std::fabs(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
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

// 1 / max(|x|, eps). Where the squares overflow, |x| is taken of numbers scaled to 1.
INLINE float inverse_length(const float* x, int64_t width, float eps) {
  float sum = 0;
  for (int64_t j = 0; j < width; ++j) sum += x[j] * x[j];
  if (!std::isinf(sum)) return 1.0f / std::max(std::sqrt(sum), eps);
  float largest = 0;
  for (int64_t j = 0; j < width; ++j) largest = std::max(largest, std::fabs(x[j]));
  if (std::isinf(largest)) return 0.0f;
  const float inverse = 1.0f / largest;
  sum = 0;
  for (int64_t j = 0; j < width; ++j) {
    const volatile float scaled = x[j] * inverse;  // or the compiler would square x first
    sum += scaled * scaled;
  }
  return AS_WRITTEN(1.0f / std::sqrt(sum)) * inverse;
}

// 1 / sqrt(mean(x^2) + eps).
template <class T>
INLINE float inverse_rms(const T* x, int64_t width, float eps) {
  float sum = 0;
  for (int64_t j = 0; j < width; ++j) sum += widen(x[j]) * widen(x[j]);
  return 1.0f / std::sqrt(sum / width + eps);
}

}  // namespace
