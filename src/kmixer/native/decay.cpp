// Decayed linear attention, as its recurrence: S = g S + k v^T, y = q S, with the state in cache.

#include "gemm.h"

namespace {

// Channels of one block of the decay kernels, and the vectors of them whose state, of four ranks, fits the registers.
constexpr int64_t kWide = 64;
#ifdef __AVX512F__
constexpr int kStateParts = 4;
#else
constexpr int kStateParts = 2;
#endif
constexpr int64_t kPass = kStateParts * kLanes;
// Positions of a tile of the backward pass: lags for the gradient of the decay are counted from its
// start, so that sums over positions do not cancel.
constexpr int64_t kChunk = 32;

// `ranks` rows of the state and kPass channels, for all positions; adds to y where `more` holds.
// With few ranks the compiler keeps the state in registers.
template <int ranks>
INLINE void decay_forward_pass(const float* q, const float* k, const float* v, const float* g, float* S, float* y,
                               int64_t t, int64_t r, int64_t d, bool more) {
  Vector state[ranks][kStateParts];
  for (int c = 0; c < ranks; ++c)
    for (int p = 0; p < kStateParts; ++p) state[c][p] = load(S + c * kWide + p * kLanes);
  for (int64_t i = 0; i < t; ++i, q += r, k += r, v += d, y += d) {
    for (int p = 0; p < kStateParts; ++p) {
      const Vector value = load(v + p * kLanes);
      Vector sum = more ? load(y + p * kLanes) : Vector{};
      for (int c = 0; c < ranks; ++c) {
        state[c][p] = state[c][p] * g[c] + value * k[c];
        sum += state[c][p] * q[c];
      }
      store(sum, y + p * kLanes);
    }
  }
  for (int c = 0; c < ranks; ++c)
    for (int p = 0; p < kStateParts; ++p) store(state[c][p], S + c * kWide + p * kLanes);
}

// The passes that cover so many channels; a block's state, values and outputs have kWide channels, zero beyond.
INLINE int64_t passes(int64_t width) { return (width + kPass - 1) / kPass; }

// dq of one tile and kPass channels, from the same recurrence; adds the new state to S. Adds to dq where `more` holds.
template <int ranks>
INLINE void decay_queries_pass(const float* k, const float* v, const float* g, const float* dy, float* S, float* dq,
                               int64_t t, int64_t r, int64_t d, bool more) {
  Vector state[ranks][kStateParts];
  for (int c = 0; c < ranks; ++c)
    for (int p = 0; p < kStateParts; ++p) state[c][p] = load(S + c * kWide + p * kLanes);
  for (int64_t i = 0; i < t; ++i, k += r, v += d, dy += d, dq += r) {
    Vector dot[ranks] = {};
    for (int p = 0; p < kStateParts; ++p) {
      const Vector value = load(v + p * kLanes), gradient = load(dy + p * kLanes);
      for (int c = 0; c < ranks; ++c) {
        state[c][p] = state[c][p] * g[c] + value * k[c];
        dot[c] += state[c][p] * gradient;
      }
    }
    store_sums(dot, dq, more);
  }
  for (int c = 0; c < ranks; ++c)
    for (int p = 0; p < kStateParts; ++p) store(state[c][p], S + c * kWide + p * kLanes);
}

// dk and dv of one tile and kPass channels, from the recurrence of dS backwards in time; dk is added to where
// `more_channels` holds, dv where `more_ranks` does.
template <int ranks>
INLINE void decay_keys_pass(const float* q, const float* k, const float* v, const float* g, const float* dy, float* dS,
                            float* dk, float* dv, int64_t t, int64_t r, int64_t d, bool more_channels,
                            bool more_ranks) {
  Vector state[ranks][kStateParts];
  for (int c = 0; c < ranks; ++c)
    for (int p = 0; p < kStateParts; ++p) state[c][p] = load(dS + c * kWide + p * kLanes);
  for (int64_t i = t - 1; i >= 0; --i) {
    const float *qi = q + i * r, *ki = k + i * r, *vi = v + i * d, *dyi = dy + i * d;
    Vector dot[ranks] = {};
    for (int p = 0; p < kStateParts; ++p) {
      const Vector value = load(vi + p * kLanes), gradient = load(dyi + p * kLanes);
      Vector sum = more_ranks ? load(dv + i * d + p * kLanes) : Vector{};
      for (int c = 0; c < ranks; ++c) {
        const Vector ds = state[c][p] + gradient * qi[c];
        dot[c] += ds * value;
        sum += ds * ki[c];
        state[c][p] = ds * g[c];
      }
      store(sum, dv + i * d + p * kLanes);
    }
    store_sums(dot, dk + i * r, more_channels);
  }
  for (int c = 0; c < ranks; ++c)
    for (int p = 0; p < kStateParts; ++p) store(state[c][p], dS + c * kWide + p * kLanes);
}

// The part of the gradient of log g inside a tile. Every term of the loss carries g to the power of its lag, so its
// derivative by log g is lag times the term: inside a tile that is sum_i i (q_i dq_i - k_i dk_i).
INLINE void decay_lags(const float* q, const float* k, const float* dq, const float* dk, double* dlog, int64_t t,
                       int64_t r) {
  for (int64_t i = t - 1; i >= 0; --i)
    for (int64_t c = 0; c < r; ++c)
      dlog[c] += i * (double(q[i * r + c]) * dq[i * r + c] - double(k[i * r + c]) * dk[i * r + c]);
}

// A state that crosses from one tile to the next, or enters or leaves the sequence, adds the number of
// positions of its tile before the crossing times <S, dS> to the gradient of log g.
INLINE void decay_crossing(const float* S, const float* dS, int64_t positions, double* dlog, int64_t r) {
  for (int64_t c = 0; c < r; ++c) {
    double product = 0;
    for (int64_t j = 0; j < kWide; ++j) product += S[c * kWide + j] * dS[c * kWide + j];
    dlog[c] += positions * product;
  }
}

INLINE void load_state(const float* state, float* S, int64_t r, int64_t d, int64_t width) {
  std::fill(S, S + r * kWide, 0.0f);
  for (int64_t c = 0; c < r; ++c) std::memcpy(S + c * kWide, state + c * d, sizeof(float) * width);
}

INLINE void store_state(const float* S, float* state, int64_t r, int64_t d, int64_t width) {
  for (int64_t c = 0; c < r; ++c) std::memcpy(state + c * d, S + c * kWide, sizeof(float) * width);
}

template <class T>
void decay_forward(const float* q, const float* k, const T* v, const float* g, const float* state, T* y, float* final,
                   int64_t b, int64_t t, int64_t r, int64_t d, int64_t threads) {
  const int64_t blocks = (d + kWide - 1) / kWide;
  // Keys, queries, values and outputs of a tile of positions stay in the first cache level.
  constexpr int64_t kTile = 64;
  parallel(b * blocks, threads, [=](int64_t begin, int64_t end, int64_t) {
    std::vector<float> scratch(r * kWide);
    float* S = scratch.data();
    for (int64_t job = begin; job < end; ++job) {
      const int64_t row = job / blocks, first = job % blocks * kWide, width = std::min(kWide, d - first);
      const int64_t keys = row * t * r, channels = row * t * d + first;
      TileOf<T> values(width, d, kWide, kTile), outputs(width, d, kWide, kTile);
      const int64_t stride = values.stride();
      load_state(state + row * r * d + first, S, r, d, width);
      for (int64_t i = 0; i < t; i += kTile) {
        const int64_t length = std::min(kTile, t - i), at = keys + i * r;
        const float* in = values.take(v + channels + i * d, length);
        float* out = outputs.place(y + channels + i * d);
        in_groups(r, [&](int64_t c, auto ranks) __attribute__((always_inline)) {
          for (int64_t pass = 0, j = 0; pass < passes(width); ++pass, j += kPass)
            decay_forward_pass<ranks>(q + at + c, k + at + c, in + j, g + c, S + c * kWide + j, out + j, length, r,
                                      stride, c > 0);
        });
        outputs.give(y + channels + i * d, length);
      }
      store_state(S, final + row * r * d + first, r, d, width);
    }
  });
}

template <class T>
void decay_backward(const float* q, const float* k, const T* v, const float* g, const float* state, const T* dy,
                    const float* dfinal, float* dq, float* dk, T* dv, double* dlog, float* dstate, int64_t b,
                    int64_t t, int64_t r, int64_t d, int64_t threads) {
  const int64_t blocks = (d + kWide - 1) / kWide;
  parallel(b * blocks, threads, [=](int64_t begin, int64_t end, int64_t) {
    const int64_t chunks = (t + kChunk - 1) / kChunk;
    std::vector<float> scratch((2 + chunks) * r * kWide);
    float *S = scratch.data(), *dS = S + r * kWide, *starts = dS + r * kWide;
    for (int64_t job = begin; job < end; ++job) {
      const int64_t row = job / blocks, block = job % blocks, first = block * kWide, width = std::min(kWide, d - first);
      const int64_t keys = row * t * r, channels = row * t * d + first, part = (block * b + row) * t * r;
      double* dlog_part = dlog + (block * b + row) * r;
      std::fill(dlog_part, dlog_part + r, 0.0);
      TileOf<T> values(width, d, kWide, kChunk), gradients(width, d, kWide, kChunk), outputs(width, d, kWide, kChunk);
      const int64_t stride = values.stride();
      load_state(state + row * r * d + first, S, r, d, width);
      for (int64_t tile = 0; tile < chunks; ++tile) {
        const int64_t i = tile * kChunk, length = std::min(kChunk, t - i), at = i * r;
        const float *value = values.take(v + channels + i * d, length),
                    *gradient = gradients.take(dy + channels + i * d, length);
        std::memcpy(starts + tile * r * kWide, S, sizeof(float) * r * kWide);
        in_groups(r, [&](int64_t c, auto ranks) __attribute__((always_inline)) {
          for (int64_t pass = 0, j = 0; pass < passes(width); ++pass, j += kPass)
            decay_queries_pass<ranks>(k + keys + at + c, value + j, g + c, gradient + j, S + c * kWide + j,
                                      dq + part + at + c, length, r, stride, pass > 0);
        });
      }
      load_state(dfinal + row * r * d + first, dS, r, d, width);
      decay_crossing(S, dS, (t - 1) % kChunk, dlog_part, r);
      for (int64_t tile = chunks - 1; tile >= 0; --tile) {
        const int64_t i = tile * kChunk, length = std::min(kChunk, t - i), at = i * r;
        const float *value = values.take(v + channels + i * d, length),
                    *gradient = gradients.take(dy + channels + i * d, length);
        float* out = outputs.place(dv + channels + i * d);
        in_groups(r, [&](int64_t c, auto ranks) __attribute__((always_inline)) {
          for (int64_t pass = 0, j = 0; pass < passes(width); ++pass, j += kPass)
            decay_keys_pass<ranks>(q + keys + at + c, k + keys + at + c, value + j, g + c, gradient + j,
                                   dS + c * kWide + j, dk + part + at + c, out + j, length, r, stride, pass > 0, c > 0);
        });
        outputs.give(dv + channels + i * d, length);
        decay_lags(q + keys + at, k + keys + at, dq + part + at, dk + part + at, dlog_part, length, r);
        decay_crossing(starts + tile * r * kWide, dS, tile == 0 ? 1 : kChunk, dlog_part, r);
      }
      store_state(dS, dstate + row * r * d + first, r, d, width);
    }
  });
}
}  // namespace

extern "C" {

// y (b, t, d) and final (b, r, d); q, k (b, t, r), v (b, t, d), g (r,), state (b, r, d). v and y are bfloat16 where
// bf16 != 0, else float32.
void decay_forward(const float* q, const float* k, const void* v, const float* g, const float* state, void* y,
                   float* final, int64_t b, int64_t t, int64_t r, int64_t d, int32_t bf16, int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    decay_forward(q, k, (const T*)v, g, state, (T*)y, final, b, t, r, d, threads);
  });
}

// Partial sums over blocks of 64 channels: dq, dk (blocks, b, t, r), dlog (blocks, b, r); dv (b, t, d), as v is, dstate
// (b, r, d).
void decay_backward(const float* q, const float* k, const void* v, const float* g, const float* state, const void* dy,
                    const float* dfinal, float* dq, float* dk, void* dv, double* dlog, float* dstate, int64_t b,
                    int64_t t, int64_t r, int64_t d, int32_t bf16, int64_t threads) {
  of_element(bf16, [=](auto element) {
    using T = decltype(element);
    decay_backward(q, k, (const T*)v, g, state, (const T*)dy, dfinal, dq, dk, (T*)dv, dlog, dstate, b, t, r, d,
                   threads);
  });
}

}  // extern "C"
