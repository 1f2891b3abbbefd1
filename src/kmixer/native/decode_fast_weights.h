// Fast weights in a decoding step: a matrix of its own for every row, which every token reads and the end of a chunk
// writes. See layers/fast_weights.py.
#pragma once

#include "chunk_filter.h"
#include "few_rows.h"
#include "gemm.h"

// A layer; generation/operations.py builds the same structure. `wide` is d in whole panels, zero beyond d. Tokens that are
// read and not kept yet stand behind those of the unfinished chunk.
struct FastWeights {
  const float* weight;  // W_0 and its bias, in panels
  const float* taps;    // (count, wide), those of one offset in a row
  const float* target;  // W_t (d, wide)
  float* learned;       // F^T (rows, f, wide)
  float* panels;        // W_0 + F and the bias (rows, panels, f + 1, kPanel)
  float* hidden;        // Z (rows, room, f)
  float* targets;       // T (rows, room, wide)
  int64_t* positions;   // since a row began or was reset (rows,)
  int64_t source, count, chunk, reset_every;  // buffer of T, taps, C, and 0 where nothing is reset
  int64_t f, d, room;
  float decay, rate, largest, unused;  // lambda of a chunk; norm that F keeps within
};

namespace {

INLINE int64_t panel_floats(const FastWeights& fast) { return (fast.f + 1) * in_panels(fast.d); }

// W_0 + F in panels; of F null, W_0.
INLINE void add_learned(const FastWeights& fast, const float* learned, float* panels) {
  std::memcpy(panels, fast.weight, sizeof(float) * panel_floats(fast));
  const int64_t wide = in_panels(fast.d);
  for (int64_t j = 0; learned && j < wide; j += kPanel, panels += (fast.f + 1) * kPanel)
    for (int64_t k = 0; k < fast.f; ++k)
      for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
        float* to = panels + k * kPanel + lane;
        store(load(to) + load(learned + k * wide + j + lane), to);
      }
}

// after = lambda before + rate Z^T V with V = filter(T) W_t, within the largest norm; before null is zeros. `scratch` is
// room for two chunks of d.
INLINE void write_chunk(const FastWeights& fast, const float* hidden, const float* targets, const float* before,
                        float* after, float* scratch) {
  const int64_t wide = in_panels(fast.d), size = fast.f * wide;
  float *filtered = scratch, *values = scratch + fast.chunk * wide;
  filter_chunk({fast.taps, wide, fast.count, fast.chunk, wide}, targets, wide, filtered, wide, false);
  multiply({filtered, wide, 1}, fast.target, wide, values, wide, fast.chunk, fast.d, wide, false);
  for (int64_t j = 0; j < fast.chunk * wide; ++j) values[j] *= fast.rate;
  for (int64_t j = 0; j < size; ++j) after[j] = before ? fast.decay * before[j] : 0.0f;
  multiply({hidden, 1, fast.f}, values, wide, after, wide, fast.f, fast.chunk, wide, true);
  if (std::isinf(fast.largest)) return;
  double squares = 0;
  for (int64_t j = 0; j < size; ++j) squares += double(after[j]) * after[j];
  const float norm = float(std::sqrt(squares));
  if (norm > fast.largest)
    for (int64_t j = 0; j < size; ++j) after[j] *= fast.largest / norm;
}

// What n tokens from a position on are: read(t, count, entry) of tokens that see one F, where entry is the place of the
// first in the buffers; write(entry, t) where a chunk is finished with token t - 1, which began there; forget() where a
// row begins anew. Returns position, and entries of the unfinished chunk, first and last + 1.
struct Standing {
  int64_t position, first, last;
};
template <class Read, class Write, class Forget>
INLINE Standing in_chunks(const FastWeights& fast, int64_t position, int64_t n, Read read, Write write, Forget forget) {
  const int64_t until = fast.reset_every;
  if (until && position >= until) {  // of a state from a longer interval
    forget();
    position = 0;
  }
  int64_t begun = position % fast.chunk, first = 0;
  for (int64_t t = 0; t < n;) {
    int64_t count = std::min(n - t, fast.chunk - begun);
    if (until) count = std::min(count, until - position);
    read(t, count, first + begun);
    t += count, begun += count, position += count;
    if (begun == fast.chunk) {
      write(first, t);
      first += begun, begun = 0;
    }
    if (until && position == until) {
      forget();
      first += begun, begun = 0, position = 0;
    }
  }
  return {position, first, first + begun};
}

// out = onto + Z (W_0 + F)^T + bias for n tokens of a row, while F stays as it is. Z and T stay for `keep_adapted`.
INLINE void read_adapted(const FastWeights& fast, int64_t row, int64_t n, Rows<const float> z, Rows<const float> t,
                         Rows<const float> onto, Rows<float> out, std::vector<float>& scratch) {
  const int64_t wide = in_panels(fast.d), f = fast.f, size = panel_floats(fast);
  const float *learned = fast.learned + row * f * wide, *panels = fast.panels + row * size;
  float *hidden = fast.hidden + row * fast.room * f, *targets = fast.targets + row * fast.room * wide;
  in_chunks(
      fast, fast.positions[row], n,
      [&](int64_t first, int64_t count, int64_t entry) {
        for (int64_t i = 0; i < count; ++i) {
          std::memcpy(hidden + (entry + i) * f, z.at(first + i), sizeof(float) * f);
          std::memcpy(targets + (entry + i) * wide, t.at(first + i), sizeof(float) * wide);
        }
        for (int64_t j = 0; j < wide; j += kPanel)
          multiply_panel(z.from(first, 0), panels + j * (f + 1), f, onto.from(first, j), out.from(first, j), count);
      },
      [&](int64_t entry, int64_t next) {
        if (next == n) return;  // nobody reads it now
        scratch.resize(size + f * wide + 2 * fast.chunk * wide);
        float *sum = scratch.data(), *after = sum + size;
        write_chunk(fast, hidden + entry * f, targets + entry * wide, learned, after, after + f * wide);
        add_learned(fast, after, sum);
        learned = after, panels = sum;
      },
      [&] { learned = nullptr, panels = fast.weight; });
}

// F and the unfinished chunk of a row after the first n of the tokens that were read.
INLINE void keep_adapted(const FastWeights& fast, int64_t row, int64_t n, std::vector<float>& scratch) {
  const int64_t wide = in_panels(fast.d), f = fast.f;
  float *learned = fast.learned + row * f * wide, *panels = fast.panels + row * panel_floats(fast);
  float *hidden = fast.hidden + row * fast.room * f, *targets = fast.targets + row * fast.room * wide;
  const Standing now = in_chunks(
      fast, fast.positions[row], n, [](int64_t, int64_t, int64_t) {},
      [&](int64_t entry, int64_t) {
        scratch.resize(2 * fast.chunk * wide);
        write_chunk(fast, hidden + entry * f, targets + entry * wide, learned, learned, scratch.data());
        add_learned(fast, learned, panels);
      },
      [&] {
        std::memset(learned, 0, sizeof(float) * f * wide);
        add_learned(fast, nullptr, panels);
      });
  fast.positions[row] = now.position;
  if (now.first == 0) return;
  std::memmove(hidden, hidden + now.first * f, sizeof(float) * (now.last - now.first) * f);
  std::memmove(targets, targets + now.first * wide, sizeof(float) * (now.last - now.first) * wide);
}

}  // namespace
