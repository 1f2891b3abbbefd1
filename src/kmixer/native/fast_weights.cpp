// Fast weights: chunks of positions read a matrix and then write into it, row of the batch by row. See ops/fast_weights.py.
//
//   P_i = filter(T_i), V_i = rate P_i W                 (c, d)
//   Y_i = Z_i (S_i + W_0^T) + bias                      S (f, d)
//   S_{i+1} = decay S_i + Z_i^T V_i
//
// What a chunk takes stays in cache between its products. The threads share the rows of the batch, and sums over rows are
// added in the order of the threads.

#include "chunk_filter.h"
#include "elementwise.h"
#include "gemm.h"

namespace {

struct Sizes {
  int64_t n, c, f, d, taps;
};

void filter_gradient(const Padded& dp, const float* targets, float* dtaps, int64_t stride, const Sizes& s) {
  const int64_t reach = s.taps / 2;
  for (int64_t k = 0; k < s.taps; ++k) {
    float* __restrict sum = dtaps + k * stride;
    for (int64_t i = std::max<int64_t>(0, reach - k); i < std::min(s.c, s.c + reach - k); ++i) {
      const float *__restrict x = targets + (i + k - reach) * s.d, *__restrict gradient = dp.row(i);
      for (int64_t j = 0; j < s.d; ++j) sum[j] += gradient[j] * x[j];
    }
  }
}

void copy_rows(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * to_row, from + i * from_row, sizeof(float) * width);
}

void scale_rows(Padded& x, float factor, int64_t rows) {
  float* __restrict data = x.data.data();
  for (int64_t j = 0; j < rows * x.stride; ++j) data[j] *= factor;
}

void add_row(const float* __restrict x, float* __restrict to, int64_t width) {
  for (int64_t j = 0; j < width; ++j) to[j] += x[j];
}

void scale_and_add_row(float factor, float* __restrict to, const float* __restrict x, int64_t width) {
  for (int64_t j = 0; j < width; ++j) to[j] = factor * to[j] + x[j];
}

// The sum of two matrices of one size.
void add_into(const Padded& x, const Padded& y, Padded& to) {
  const float *__restrict one = x.data.data(), *__restrict other = y.data.data();
  float* __restrict sum = to.data.data();
  for (int64_t j = 0; j < int64_t(to.data.size()); ++j) sum[j] = one[j] + other[j];
}

// to (columns, rows), of rows that are `row` apart.
void transpose_into(const float* from, int64_t row, Padded& to, int64_t rows, int64_t columns) {
  for (int64_t first = 0; first < rows; first += kPadding) {
    const int64_t last = std::min(first + kPadding, rows);
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = first; i < last; ++i) to.row(j)[i] = from[i * row + j];
  }
}

}  // namespace

extern "C" {

// hidden (b, n, c, f), targets (b, n, c, d), taps (d, count), matrix (d, d), weight W_0 (d, f) or null for zeros, bias (d,)
// or null, before (b, f, d); y (b, n, c, d), after (b, n + 1, f, d).
void fast_weights_forward(const float* hidden, const float* targets, const float* taps, const float* matrix,
                          const float* weight, const float* bias, const float* before, float* y, float* after,
                          int64_t b, int64_t n, int64_t c, int64_t f, int64_t d, int64_t count, float decay, float rate,
                          int64_t threads) {
  parallel(b, threads, [=](int64_t begin, int64_t end, int64_t) {
    const Padded by_tap = transpose_of(taps, d, count), w = copy_of(matrix, d, d);
    const Padded fixed = weight ? transpose_of(weight, d, f) : Padded(0, 0);
    const ChunkFilter filter{by_tap.row(0), by_tap.stride, count, c, d};
    Padded p(c, d), v(c, d), out(c, d), state(f, d), both(weight ? f : 0, d);
    for (int64_t row = begin; row < end; ++row) {
      float* states = after + row * (n + 1) * f * d;
      copy_rows(before + row * f * d, d, state.row(0), state.stride, f, d);
      copy_rows(state.row(0), state.stride, states, d, f, d);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = (row * n + i) * c;
        const float *z = hidden + at * f, *t = targets + at * d;
        if (weight) add_into(state, fixed, both);
        multiply({z, f, 1}, weight ? both.row(0) : state.row(0), state.stride, out.row(0), out.stride, c, f, padded(d),
                 false);
        for (int64_t k = 0; bias && k < c; ++k) add_row(bias, out.row(k), d);
        copy_rows(out.row(0), out.stride, y + at * d, d, c, d);
        filter_chunk(filter, t, d, p.row(0), p.stride, false);
        multiply({p.row(0), p.stride, 1}, w.row(0), w.stride, v.row(0), v.stride, c, d, padded(d), false);
        scale_rows(v, rate, c);
        scale_rows(state, decay, f);
        multiply({z, 1, f}, v.row(0), v.stride, state.row(0), state.stride, f, c, padded(d), true);
        copy_rows(state.row(0), state.stride, states + (i + 1) * f * d, d, f, d);
      }
    }
  });
}

// Gradients of all but the rate, from dy (b, n, c, d) and dafter (b, n + 1, f, d) or null. ddecay (1,); dweight and dbias
// are null where the two are not there.
void fast_weights_backward(const float* dy, const float* dafter, const float* hidden, const float* targets,
                           const float* taps, const float* matrix, const float* weight, const float* after,
                           float* dhidden, float* dtargets, float* dtaps, float* dmatrix, float* dweight, float* dbias,
                           float* dbefore, float* ddecay, int64_t b, int64_t n, int64_t c, int64_t f, int64_t d,
                           int64_t count, float decay, float rate, int64_t threads) {
  const Sizes s{n, c, f, d, count};
  const int64_t wide = stride_of(d);
  RowSums taps_sums(threads, count * wide), matrix_sums(threads, d * wide), decay_sums(threads, 1), bias_sums(threads, d);
  RowSums weight_sums(threads, weight ? f * wide : 0);
  parallel(b, threads, [&](int64_t begin, int64_t end, int64_t thread) {
    const Padded by_tap = transpose_of(taps, d, count), w = copy_of(matrix, d, d), turned = transpose_of(matrix, d, d);
    const ChunkFilter filter{by_tap.row(0), by_tap.stride, count, c, d};
    Padded p(c, d), v(c, d), dv(c, d), dp(c, d), gradient(c, d), dstate(f, d), across(d, f), dz(c, f), update(f, d);
    double decays = 0;
    for (int64_t row = begin; row < end; ++row) {
      const float* states = after + row * (n + 1) * f * d;
      const float* dstates = dafter ? dafter + row * (n + 1) * f * d : nullptr;
      bool written = dafter != nullptr;  // whether anything after reads what this chunk writes
      if (dstates) copy_rows(dstates + n * f * d, d, dstate.row(0), dstate.stride, f, d);
      else std::fill(dstate.data.begin(), dstate.data.end(), 0.0f);
      for (int64_t i = n - 1; i >= 0; --i) {
        const int64_t at = (row * n + i) * c;
        const float *z = hidden + at * f, *t = targets + at * d, *state = states + i * f * d;
        copy_rows(dy + at * d, d, gradient.row(0), gradient.stride, c, d);
        for (int64_t k = 0; dbias && k < c; ++k) add_row(gradient.row(k), bias_sums.of(thread), d);
        transpose_into(state, d, across, f, d);
        for (int64_t k = 0; weight && k < d; ++k) add_row(weight + k * f, across.row(k), f);
        multiply({gradient.row(0), gradient.stride, 1}, across.row(0), across.stride, dz.row(0), dz.stride, c, d,
                 padded(f), false);
        if (written) {
          filter_chunk(filter, t, d, p.row(0), p.stride, false);
          multiply({p.row(0), p.stride, 1}, w.row(0), w.stride, v.row(0), v.stride, c, d, padded(d), false);
          scale_rows(v, rate, c);
          transpose_into(dstate.row(0), dstate.stride, across, f, d);
          multiply({v.row(0), v.stride, 1}, across.row(0), across.stride, dz.row(0), dz.stride, c, d, padded(f), true);
          multiply({z, f, 1}, dstate.row(0), dstate.stride, dv.row(0), dv.stride, c, f, padded(d), false);
          scale_rows(dv, rate, c);
          multiply({p.row(0), 1, p.stride}, dv.row(0), dv.stride, matrix_sums.of(thread), wide, d, c, padded(d), true);
          multiply({dv.row(0), dv.stride, 1}, turned.row(0), turned.stride, dp.row(0), dp.stride, c, d, padded(d), false);
          filter_gradient(dp, t, taps_sums.of(thread), wide, s);
          filter_chunk(filter, dp.row(0), dp.stride, p.row(0), p.stride, true);
          copy_rows(p.row(0), p.stride, dtargets + at * d, d, c, d);
          float sum = 0;
          for (int64_t k = 0; k < f; ++k)
            for (int64_t j = 0; j < d; ++j) sum += dstate.row(k)[j] * state[k * d + j];
          decays += sum;
        } else {
          std::fill(dtargets + at * d, dtargets + (at + c) * d, 0.0f);
        }
        copy_rows(dz.row(0), dz.stride, dhidden + at * f, f, c, f);
        multiply({z, 1, f}, gradient.row(0), gradient.stride, update.row(0), update.stride, f, c, padded(d), false);
        for (int64_t k = 0; k < f; ++k) scale_and_add_row(decay, dstate.row(k), update.row(k), d);
        for (int64_t k = 0; weight && k < f; ++k) add_row(update.row(k), weight_sums.of(thread) + k * wide, d);
        for (int64_t k = 0; dstates && k < f; ++k)
          for (int64_t j = 0; j < d; ++j) dstate.row(k)[j] += dstates[(i * f + k) * d + j];
        written = true;
      }
      copy_rows(dstate.row(0), dstate.stride, dbefore + row * f * d, d, f, d);
    }
    *decay_sums.of(thread) = float(decays);
  });
  decay_sums.total(ddecay);
  matrix_sums.total(dmatrix, d, wide);
  if (dbias) bias_sums.total(dbias);
  for (int64_t j = 0; weight && j < d; ++j)  // dweight (d, f), of sums (f, d)
    for (int64_t k = 0; k < f; ++k) dweight[j * f + k] = weight_sums.at(k * wide + j);
  for (int64_t j = 0; j < d; ++j)  // dtaps (d, count), of sums by offset
    for (int64_t k = 0; k < count; ++k) dtaps[j * count + k] = taps_sums.at(k * wide + j);
}

}  // extern "C"
