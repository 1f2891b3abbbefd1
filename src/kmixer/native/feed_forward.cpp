// The feed-forward block, h + W2 dropout(activation(W1 x + b1)) + b2 with x = norm(h), a tile of rows at a time; and
// its hidden units alone, dropout(GELU(W1 x + b1)), for layers whose second matrix is not fixed.
//
// Between the two matrix products nothing leaves the cache; W1 x (rows, m) is kept for the backward pass.
// Rows are shared evenly by the threads, and sums over rows are added in the order of the threads.

#include "norms.h"
#include "pairs.h"

namespace {

constexpr int64_t kTile = 48;

template <class Activation, class T, class Norm>
void forward(Norm norm, const T* h, const float* w1, const float* b1, const float* w2, const float* b2, T* out,
             T* hidden, int64_t rows, int64_t d, int64_t m, Dropout dropout, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    const auto up = inner_columns<T>(w1, m, d), down = inner_columns<T>(w2, d, m);
    RowTile<T> x(kTile, d), z(kTile, m);
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t count = std::min(kTile, end - first);
      for (int64_t i = 0; i < count; ++i) norm.forward(h + (first + i) * d, first + i, x.row(i), d);
      multiply(x.along_columns(), up.row(0), up.stride, z.sums(), z.sums_stride(), count, d, padded(m), false);
      for (int64_t i = 0; i < count; ++i) {
        T* kept = hidden + (first + i) * m;
        convert_row(z.sums() + i * z.sums_stride(), kept, m);
        activation_row<Activation>(kept, b1, z.row(i), m, uint32_t((first + i) * m), dropout);
      }
      multiply(z.along_columns(), down.row(0), down.stride, x.sums(), x.sums_stride(), count, m, padded(d), false);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (first + i) * d;
        const float* sum = x.sums() + i * x.sums_stride();
        for (int64_t j = 0; j < d; ++j) narrow(widen(h[at + j]) + (sum[j] + b2[j]), &out[at + j]);
      }
    }
  });
}

template <class Activation, class T, class Norm>
void backward(Norm norm, const T* dout, const T* h, const float* w1, const float* b1, const float* w2, const T* hidden,
              T* dh, float* dnorm, float* dw1, float* db1, float* dw2, float* db2, int64_t rows, int64_t d, int64_t m,
              Dropout dropout, int64_t threads) {
  const int64_t wide = stride_of(d), tall = stride_of(m);
  NormGradients<Norm> norm_sums(threads, d);
  RowSums bias1_sums(threads, m), bias2_sums(threads, d);
  RowSums up_sums(threads, m * wide), down_sums(threads, d * tall);
  parallel(rows, threads, [&](int64_t begin, int64_t end, int64_t thread) {
    const auto up = inner_rows<T>(w1, m, d), down = inner_rows<T>(w2, d, m);
    RowTile<T> x(kTile, d), dy(kTile, d), z(kTile, m), du(kTile, m);
    Padded dx(kTile, d), dz(kTile, m);
    float* bias2_sum = bias2_sums.of(thread);
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t count = std::min(kTile, end - first);
      for (int64_t i = 0; i < count; ++i) {
        const T* gradient = dout + (first + i) * d;
        norm.again(h + (first + i) * d, first + i, x.row(i), d);
        convert_row(gradient, dy.row(i), d);
        for (int64_t j = 0; j < d; ++j) bias2_sum[j] += widen(gradient[j]);
      }
      multiply(dy.along_columns(), down.row(0), down.stride, dz.row(0), dz.stride, count, d, padded(m), false);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (first + i) * m;
        activation_backward_row<Activation, true>(hidden + at, b1, dz.row(i), du.row(i), z.row(i),
                                                  bias1_sums.of(thread), m, uint32_t(at), dropout);
      }
      for (RowTile<T>* tile : {&x, &dy, &z, &du}) tile->pair(count);
      multiply(dy.along_rows(), z.paired(), z.paired_stride(), down_sums.of(thread), tall, d, count, padded(m), true);
      multiply(du.along_rows(), x.paired(), x.paired_stride(), up_sums.of(thread), wide, m, count, padded(d), true);
      multiply(du.along_columns(), up.row(0), up.stride, dx.row(0), dx.stride, count, m, padded(d), false);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (first + i) * d;
        norm.template backward<true>(h + at, first + i, dx.row(i), dy.row(i), dh + at, norm_sums.of(thread), d);
      }
    }
  });
  norm_sums.total(dnorm);
  bias1_sums.total(db1);
  bias2_sums.total(db2);
  up_sums.total(dw1, d, wide);
  down_sums.total(dw2, m, tall);
}

}  // namespace

extern "C" {

// out, h (rows, d), hidden (rows, m), all bfloat16 where bf16 != 0, else float32; w1 (m, d), b1 (m,), w2 (d, m), b2 (d,),
// whose matrices are rounded likewise. The activation is GELU, or the square of ReLU. norm: what the norm of a kind has
// learned, see norms.h; inverse (rows,) is RMSNorm's, 1 / sqrt(mean(h^2) + eps).
void feed_forward_forward(const void* h, const float* norm, const float* w1, const float* b1, const float* w2,
                          const float* b2, void* out, void* hidden, float* inverse, int64_t rows, int64_t d, int64_t m,
                          float eps, uint32_t seed, uint32_t threshold, float scale, int64_t squared_relu,
                          int64_t norm_kind, int32_t bf16, int64_t threads) {
  const Dropout dropout{seed, threshold, scale};
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    with_norm(norm_kind, norm, inverse, eps, [=](auto one) {
      if (squared_relu)
        forward<SquaredRelu>(one, (const T*)h, w1, b1, w2, b2, (T*)out, (T*)hidden, rows, d, m, dropout, threads);
      else
        forward<Gelu>(one, (const T*)h, w1, b1, w2, b2, (T*)out, (T*)hidden, rows, d, m, dropout, threads);
    });
  });
}

// Gradients of everything, from dout (rows, d) and what the forward pass kept.
void feed_forward_backward(const void* dout, const void* h, const float* norm, const float* w1, const float* b1,
                           const float* w2, const void* hidden, float* inverse, void* dh, float* dnorm, float* dw1,
                           float* db1, float* dw2, float* db2, int64_t rows, int64_t d, int64_t m, uint32_t seed,
                           uint32_t threshold, float scale, int64_t squared_relu, int64_t norm_kind, int32_t bf16,
                           int64_t threads) {
  const Dropout dropout{seed, threshold, scale};
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    with_norm(norm_kind, norm, inverse, 0.0f, [=](auto one) {
      if (squared_relu)
        backward<SquaredRelu>(one, (const T*)dout, (const T*)h, w1, b1, w2, (const T*)hidden, (T*)dh, dnorm, dw1, db1,
                              dw2, db2, rows, d, m, dropout, threads);
      else
        backward<Gelu>(one, (const T*)dout, (const T*)h, w1, b1, w2, (const T*)hidden, (T*)dh, dnorm, dw1, db1, dw2,
                       db2, rows, d, m, dropout, threads);
    });
  });
}

// z, hidden (rows, m) from x (rows, d): dropout(GELU(W1 x + b1)), and W1 x for the backward pass.
void hidden_units_forward(const float* x, const float* w1, const float* b1, float* hidden, float* z, int64_t rows,
                          int64_t d, int64_t m, uint32_t seed, uint32_t threshold, float scale, int64_t threads) {
  const Dropout dropout{seed, threshold, scale};
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    const Padded up = transpose_of(w1, m, d);
    Tile a(m, m, padded(m), kTile);
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t count = std::min(kTile, end - first), at = first * m;
      multiply({x + first * d, d, 1}, up.row(0), up.stride, a.place(hidden + at), a.stride(), count, d, padded(m), false);
      a.give(hidden + at, count);
      for (int64_t i = at; i < at + count * m; i += m)
        activation_row<Gelu>(hidden + i, b1, z + i, m, uint32_t(i), dropout);
    }
  });
}

// Gradients of all three, from dz (rows, m).
void hidden_units_backward(const float* dz, const float* x, const float* w1, const float* b1, const float* hidden,
                           float* dx, float* dw1, float* db1, int64_t rows, int64_t d, int64_t m, uint32_t seed,
                           uint32_t threshold, float scale, int64_t threads) {
  const Dropout dropout{seed, threshold, scale};
  const int64_t wide = stride_of(d);
  RowSums up_sums(threads, m * wide), bias_sums(threads, m);
  parallel(rows, threads, [=, &up_sums, &bias_sums](int64_t begin, int64_t end, int64_t thread) {
    const Padded up = copy_of(w1, m, d);
    Padded du(kTile, m);
    Tile in(d, d, padded(d), kTile), out(d, d, padded(d), kTile);
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t count = std::min(kTile, end - first);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (first + i) * m;
        activation_backward_row<Gelu, false>(hidden + at, b1, dz + at, du.row(i), (float*)nullptr,
                                             bias_sums.of(thread), m, uint32_t(at), dropout);
      }
      multiply({du.row(0), 1, du.stride}, in.take(x + first * d, count), in.stride(), up_sums.of(thread), wide, m, count,
               padded(d), true);
      multiply({du.row(0), du.stride, 1}, up.row(0), up.stride, out.place(dx + first * d), out.stride(), count, m,
               padded(d), false);
      out.give(dx + first * d, count);
    }
  });
  up_sums.total(dw1, d, wide);
  bias_sums.total(db1);
}

}  // extern "C"
