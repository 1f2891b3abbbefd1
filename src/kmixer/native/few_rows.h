// A few rows times a matrix of weights, each of which is read once and in the order of memory.
//
// Weights lie in panels of kPanel columns, one after the other: (panels, inputs, kPanel), zero beyond the last column.
// They are asked for long before they are needed, beyond the end of a matrix too, where the next may lie. From memory,
// eight rows then take hardly longer than one.
#pragma once

#include "common.h"

namespace {

constexpr int64_t kPanel = 32;    // generation/operations.py packs as many
constexpr int64_t kAhead = 4096;  // floats: memory answers in the time that eight rows take for half of them
constexpr int kVectors = 2;       // of a panel at once
#ifdef __AVX512F__
constexpr int64_t kMostRows = 12;  // whose sums are held in registers
#else
constexpr int64_t kMostRows = 6;
#endif

INLINE int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// out (rows, kVectors * kLanes) = in W for a part of a panel. A fused multiply-add takes four cycles and two begin in
// each: few sums are several chains.
template <int rows>
INLINE void multiply_part(const float* in, int64_t in_stride, const float* w, int64_t inputs, float* out,
                          int64_t out_stride) {
  constexpr int chains = rows == 1 ? 4 : rows < 4 ? 2 : 1;
  Vector sum[chains][rows][kVectors] = {};
  const auto add = [&](int64_t i, int c) {
    Vector weight[kVectors];
    for (int p = 0; p < kVectors; ++p) {
      const float* from = w + i * kPanel + p * kLanes;
      __builtin_prefetch(from + kAhead);
      weight[p] = load(from);
    }
    for (int r = 0; r < rows; ++r)
      for (int p = 0; p < kVectors; ++p) sum[c][r][p] += weight[p] * in[r * in_stride + i];
  };
  int64_t i = 0;
  for (; i + chains <= inputs; i += chains)
    for (int c = 0; c < chains; ++c) add(i + c, c);
  for (; i < inputs; ++i) add(i, 0);
  for (int r = 0; r < rows; ++r)
    for (int p = 0; p < kVectors; ++p) {
      Vector whole = sum[0][r][p];
      for (int c = 1; c < chains; ++c) whole += sum[c][r][p];
      store(whole, out + r * out_stride + p * kLanes);
    }
}

template <int rows>
void multiply_rows_of(const float* in, int64_t in_stride, const float* w, int64_t inputs, float* out,
                      int64_t out_stride) {
  for (int64_t part = 0; part < kPanel; part += kVectors * kLanes)
    multiply_part<rows>(in, in_stride, w + part, inputs, out + part, out_stride);
}

using FewRows = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t);
constexpr FewRows kFewRows[] = {
    multiply_rows_of<1>, multiply_rows_of<2>, multiply_rows_of<3>, multiply_rows_of<4>,
    multiply_rows_of<5>, multiply_rows_of<6>,
#ifdef __AVX512F__
    multiply_rows_of<7>, multiply_rows_of<8>, multiply_rows_of<9>, multiply_rows_of<10>,
    multiply_rows_of<11>, multiply_rows_of<12>,
#endif
};

// out (rows, panels * kPanel) = in W. More rows than the registers hold are groups of equal size, one after the other
// for every panel, which they find in a cache.
INLINE void multiply_few(const float* in, int64_t in_stride, const float* w, int64_t inputs, int64_t panels, float* out,
                         int64_t rows) {
  const int64_t out_stride = panels * kPanel, groups = (rows + kMostRows - 1) / kMostRows;
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = rows * group / groups, count = rows * (group + 1) / groups - first;
      kFewRows[count - 1](in + first * in_stride, in_stride, w + panel * inputs * kPanel, inputs,
                          out + first * out_stride + panel * kPanel, out_stride);
    }
}

}  // namespace
