// Attention in a decoding step: keys and values of earlier positions in a ring, which every token reads and writes. See
// layers/softmax_attention.py and layers/gaussian_attention.py.
#pragma once

#include <limits>

#include "few_rows.h"

// A layer; generation/live_cache.py builds the same structure. Heads are `wide` floats in the ring, zero beyond e: whole
// vectors on every processor. `room` is a multiple of kBlock, and of the positions that are seen at least n more than
// those before the first of n tokens: tokens that are read and not kept yet stand in it behind `positions`.
struct Attention {
  const float* frequencies;  // of the e / 2 planes that turn; null where positions do not
  const float* scales;       // (h,): of products, or 1 / sigma^2
  void* keys;                // (rows, h, room, wide), of numbers of 16 bits where `bf16`, else of float32
  void* values;              // the same; of keys that are the values, `keys`
  int64_t* positions;        // of the next token (rows,)
  int64_t heads, e, wide, room;
  int64_t reach;                     // positions that are seen, the token's own included; 0: all
  int64_t query, key, value;         // first channels of these in the rows that are read
  int64_t source;                    // buffer of values
  int64_t gates, added;              // buffers of what is added to the values, or -1: logits of gates (h), vectors (d)
  int64_t gaussian, normalise, normalise_values, exclude_self;
  float eps;
  int32_t bf16;
};

namespace {

constexpr int64_t kBlock = 64;  // positions at once; generation/live_cache.py makes room for as many

// What the softmax of one token and head has come to: its highest score, and the sum of its weights beside that.
struct Softmax {
  float highest, sum;
};

INLINE void turn(float* x, const float* cosine, const float* sine, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + half] = b * cosine[i] + a * sine[i];
  }
}

INLINE void to_unit_rms(float* x, int64_t e, float eps) {
  const float scale = inverse_rms(x, e, eps);
  for (int64_t i = 0; i < e; ++i) x[i] *= scale;
}

// Asks for what lies in four rows from a column on, a line of memory of each.
template <class Kept>
INLINE void ask(const Kept* rows, int64_t wide, int64_t j) {
  if (j % int64_t(64 / sizeof(Kept)) != 0) return;
  for (int k = 0; k < 4; ++k) __builtin_prefetch(rows + k * wide + j);
}

// scores[i] = scale q . k_i, or -scale |q - k_i|^2 / 2, for i from first to last, both multiples of four. Asks for the
// values of these on the way.
template <bool gaussian, class Kept>
INLINE void score(const float* query, const Kept* keys, const Kept* values, int64_t wide, float scale, int64_t first,
                  int64_t last, float* scores) {
  for (int64_t i = first; i < last; i += 4) {
    Vector sum[4] = {};
    for (int64_t j = 0; j < wide; j += kLanes) {
      ask(values + i * wide, wide, j);
      const Vector q = load(query + j);
      for (int k = 0; k < 4; ++k) {
        const Vector key = load(keys + (i + k) * wide + j);
        sum[k] += gaussian ? (q - key) * (q - key) : q * key;
      }
    }
    store_sums(sum, scores + i, false);
  }
  const float factor = gaussian ? -0.5f * scale : scale;
  for (int64_t i = first; i < last; ++i) scores[i] *= factor;
}

// total = share total + sum_i weights_i values_i, i from first to last, both multiples of four. Asks for the next keys on
// the way.
template <class Kept>
INLINE void gather(const float* weights, const Kept* values, const Kept* next, int64_t wide, float share, int64_t first,
                   int64_t last, float* total) {
  for (int64_t j = 0; j < wide; j += kLanes) store(share * load(total + j), total + j);
  for (int64_t i = first; i < last; i += 4) {
    const Kept* from = values + i * wide;
    for (int64_t j = 0; j < wide; j += kLanes, from += kLanes) {
      ask(next + i * wide, wide, j);
      const Vector some = weights[i] * load(from) + weights[i + 1] * load(from + wide);
      const Vector others = weights[i + 2] * load(from + 2 * wide) + weights[i + 3] * load(from + 3 * wide);
      store(load(total + j) + (some + others), total + j);
    }
  }
}

// One token and one block of positions, of which it sees those from begin to end.
template <bool gaussian, class Kept>
INLINE void attend_block(const float* query, const Kept* keys, const Kept* values, int64_t wide, float scale,
                         int64_t begin, int64_t end, Softmax* softmax, float* total) {
  float scores[kBlock];
  const int64_t first = begin / 4 * 4, last = (end + 3) / 4 * 4;
  score<gaussian>(query, keys, values, wide, scale, first, last, scores);
  const float highest = std::max(softmax->highest, highest_of(scores + begin, end - begin));
  const float share = exp_negative(softmax->highest - highest);
  for (int64_t i = first; i < last; ++i) scores[i] = exp_negative(scores[i] - highest);
  for (int64_t i = first; i < begin; ++i) scores[i] = 0;
  for (int64_t i = end; i < last; ++i) scores[i] = 0;
  float sum = 0;
  for (int64_t i = first; i < last; ++i) sum += scores[i];
  gather(scores, values, keys + kBlock * wide, wide, share, first, last, total);
  softmax->highest = highest;
  softmax->sum = softmax->sum * share + sum;
}

template <class Kept>
INLINE void keep(const float* head, int64_t e, Kept* to) {
  for (int64_t i = 0; i < e; ++i) narrow(head[i], &to[i]);
}

// Queries of a token, and its key and value in the ring. Room in `scratch`: 2 e.
template <class Kept>
INLINE void write_heads(const Attention& a, int64_t row, int64_t position, const float* from, const float* source,
                        const float* gates, const float* added, float* scratch, float* queries) {
  const int64_t e = a.e, half = e / 2, slot = position % a.room;
  const bool turns = a.frequencies != nullptr, apart = a.values != a.keys;
  float *cosine = scratch, *sine = scratch + half, *made = scratch + e;
  for (int64_t i = 0; turns && i < half; ++i) {
    const float angle = float(position) * a.frequencies[i];
    cosine[i] = std::cos(angle), sine[i] = std::sin(angle);
  }
  for (int64_t head = 0; head < a.heads; ++head) {
    const int64_t at = ((row * a.heads + head) * a.room + slot) * a.wide;
    float* query = queries + head * a.wide;
    std::memcpy(query, from + a.query + head * e, sizeof(float) * e);
    std::memcpy(made, from + a.key + head * e, sizeof(float) * e);
    if (turns) turn(query, cosine, sine, half), turn(made, cosine, sine, half);
    if (a.normalise) to_unit_rms(query, e, a.eps), to_unit_rms(made, e, a.eps);
    keep(made, e, (Kept*)a.keys + at);
    if (!apart) continue;
    std::memcpy(made, source + a.value + head * e, sizeof(float) * e);
    if (a.normalise_values) to_unit_rms(made, e, a.eps);
    if (gates != nullptr) {
      const float gate = 2 * sigmoid(gates[head]);
      for (int64_t i = 0; i < e; ++i) made[i] += gate * added[head * e + i];
    }
    keep(made, e, (Kept*)a.values + at);
  }
}

// What n tokens of a row take from all they see, blocks of positions in the order of their numbers: a token's sum does
// not depend on how many are read with it. Keys and values stay in the ring; `positions` is the caller's.
template <bool gaussian, class Kept>
INLINE void read_seen(const Attention& a, int64_t row, int64_t n, const float* queries, Rows<float> out,
                      std::vector<float>& scratch) {
  const int64_t wide = a.wide, position = a.positions[row];
  const Kept *keys = (const Kept*)a.keys, *values = (const Kept*)a.values;
  const auto first_of = [&](int64_t p) { return a.reach ? std::max<int64_t>(0, p - a.reach + 1) : 0; };
  scratch.resize(n * wide);
  thread_local std::vector<Softmax> softmax;
  softmax.resize(n);
  for (int64_t head = 0; head < a.heads; ++head) {
    std::fill(scratch.begin(), scratch.end(), 0.0f);
    std::fill(softmax.begin(), softmax.end(), Softmax{-std::numeric_limits<float>::infinity(), 0.0f});
    const int64_t ring = (row * a.heads + head) * a.room * wide;
    for (int64_t block = first_of(position) / kBlock * kBlock; block < position + n; block += kBlock) {
      const int64_t at = ring + block % a.room * wide;
      for (int64_t t = 0; t < n; ++t) {
        const int64_t p = position + t, last = a.exclude_self && p > 0 ? p : p + 1;
        const int64_t begin = std::max(first_of(p) - block, int64_t(0)), end = std::min(last - block, kBlock);
        if (begin < end)
          attend_block<gaussian>(queries + (t * a.heads + head) * wide, keys + at, values + at, wide, a.scales[head],
                                 begin, end, &softmax[t], scratch.data() + t * wide);
      }
    }
    for (int64_t t = 0; t < n; ++t) {
      const float share = 1.0f / softmax[t].sum;
      float* to = out.at(t) + head * a.e;
      for (int64_t i = 0; i < a.e; ++i) to[i] = share * scratch[t * wide + i];
    }
  }
}

// Attention of n tokens of a row; buffer(index) has their rows.
template <class Buffer>
INLINE void read_attended(const Attention& a, int64_t row, int64_t n, Rows<float> in, Buffer buffer, Rows<float> out,
                          std::vector<float>& scratch) {
  thread_local std::vector<float> queries;
  queries.assign(n * a.heads * a.wide, 0.0f);
  scratch.resize(2 * a.e);
  const Rows<float> source = buffer(a.source);
  of_element(a.bf16, [&](auto number) {
    using Kept = decltype(number);
    for (int64_t t = 0; t < n; ++t) {
      const float *gates = nullptr, *added = nullptr;
      if (a.gates >= 0) gates = buffer(a.gates).at(t), added = buffer(a.added).at(t);
      write_heads<Kept>(a, row, a.positions[row] + t, in.at(t), source.at(t), gates, added, scratch.data(),
                        queries.data() + t * a.heads * a.wide);
    }
    if (a.gaussian)
      read_seen<true, Kept>(a, row, n, queries.data(), out, scratch);
    else
      read_seen<false, Kept>(a, row, n, queries.data(), out, scratch);
  });
}

}  // namespace
