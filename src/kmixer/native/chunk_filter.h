// The filter of fast weights over the positions of a chunk, in training and in decoding.
#pragma once

#include "common.h"

namespace {

// A filter of `count` taps over c positions of d channels; taps (count, d), those of one offset in a row.
struct ChunkFilter {
  const float* taps;
  int64_t row, count, c, d;
};

// to[i] = sum over k of taps[k] * from[i + k - count / 2], zeros around the chunk; or, with `back`, what a gradient takes.
void filter_chunk(const ChunkFilter& s, const float* from, int64_t from_row, float* to, int64_t to_row, bool back) {
  const int64_t reach = s.count / 2;
  for (int64_t i = 0; i < s.c; ++i) {
    float* __restrict sum = to + i * to_row;
    for (int64_t j = 0; j < s.d; ++j) sum[j] = 0;
    for (int64_t k = 0; k < s.count; ++k) {
      const int64_t other = back ? i - k + reach : i + k - reach;
      if (other < 0 || other >= s.c) continue;
      const float *__restrict x = from + other * from_row, *__restrict weight = s.taps + k * s.row;
      for (int64_t j = 0; j < s.d; ++j) sum[j] += weight[j] * x[j];
    }
  }
}

}  // namespace
