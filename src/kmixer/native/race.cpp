// The race that draws a token (generation/sampling.py), of rows of logits at once.
//
// A token of probability P waits P / E, E = -log1p(-u) exponential of rate 1, and the largest quotient wins. The sum of the
// probabilities does not matter for it, and most tokens are left out by bounds that need neither exp nor log.

#include <numeric>

#include "common.h"

namespace {

constexpr double kSlack = 1 - 1e-9;  // of the bounds, against rounding
constexpr double kUnclear = 1e-12;   // sums of probabilities that are nearer than this to top_p may round to either side
constexpr int64_t kNoNumber = -1, kUnclearCut = -2;

struct Row {
  const float* logits;
  const int64_t* numbers;  // random, 53 bits of each are u
  double highest, temperature;

  METHOD double uniform(int64_t i) const { return double(numbers[i] & ((int64_t(1) << 53) - 1)) * 0x1p-53; }
  METHOD double scaled(int64_t i) const { return (logits[i] - highest) / temperature; }
};

struct Winner {
  double quotient = -1;
  int64_t token = kNoNumber;

  // e^x >= 1 + x + x^2/2 for x >= 0, and E >= u.
  METHOD void run(const Row& row, int64_t i, double inverse) {
    const double u = row.uniform(i), x = (row.highest - row.logits[i]) * inverse;
    if (quotient * u * (1 + x + 0.5 * x * x) * kSlack >= 1) return;
    const double other = std::exp(row.scaled(i)) / -std::log1p(-u);
    if (other > quotient) *this = {other, i};
  }
};

// The likeliest tokens that top_k and top_p leave, likeliest first; false where rounding decides which.
bool likeliest(const Row& row, int64_t v, int64_t top_k, double top_p, std::vector<int64_t>& kept,
               std::vector<double>& scaled) {
  kept.resize(v);
  scaled.resize(v);
  for (int64_t i = 0; i < v; ++i) scaled[i] = row.scaled(i);
  std::iota(kept.begin(), kept.end(), 0);
  const auto before = [&](int64_t a, int64_t b) { return scaled[a] > scaled[b] || (scaled[a] == scaled[b] && a < b); };
  const bool cut = top_k > 0 && top_k < v;
  if (cut && top_p <= 0) {
    std::nth_element(kept.begin(), kept.begin() + top_k, kept.end(), before);
    std::sort(kept.begin(), kept.begin() + top_k, before);
  } else {
    std::sort(kept.begin(), kept.end(), before);
  }
  if (cut) {
    if (scaled[kept[top_k - 1]] == scaled[kept[top_k]]) return false;
    kept.resize(top_k);
  }
  if (top_p <= 0) return true;
  double sum = 0, cumulated = 0;
  for (const int64_t i : kept) sum += std::exp(scaled[i]);
  size_t count = 0;
  for (; count < kept.size(); ++count) {
    const double probability = std::exp(scaled[kept[count]]) / sum;
    if (std::fabs(cumulated - top_p) < kUnclear) return false;
    if (cumulated >= top_p) break;
    cumulated += probability;
  }
  kept.resize(count);
  return true;
}

}  // namespace

extern "C" {

// tokens (rows,): the winners of races on logits (rows, v) with numbers (rows, v), by settings (rows, 3): temperature,
// top_k and top_p, 0 for none; `step` is 3, or 0 where the first settings are those of all rows. At temperature 0 the
// first likeliest, without numbers. A token is -1 where the highest logit is not finite, and -2 where rounding decides
// which tokens are cut.
void race(const float* logits, const int64_t* numbers, const double* settings, int64_t* tokens, int64_t rows, int64_t v,
          int64_t step, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    thread_local std::vector<int64_t> kept;
    thread_local std::vector<double> scaled;
    for (int64_t r = begin; r < end; ++r) {
      const float* x = logits + r * v;
      const double temperature = settings[r * step], top_p = settings[r * step + 2];
      const int64_t top_k = int64_t(settings[r * step + 1]);
      tokens[r] = kNoNumber;
      int64_t first = 0;
      bool numbered = true;
      for (int64_t i = 0; i < v; ++i) {
        numbered &= x[i] == x[i];
        if (x[i] > x[first]) first = i;
      }
      if (!numbered || v == 0 || !std::isfinite(x[first])) continue;
      if (temperature == 0) {
        tokens[r] = first;
        continue;
      }
      const Row row = {x, numbers + r * v, x[first], temperature};
      const double inverse = 1 / temperature;
      Winner winner;
      if ((top_k > 0 && top_k < v) || top_p > 0) {
        if (!likeliest(row, v, top_k, top_p, kept, scaled)) {
          tokens[r] = kUnclearCut;
          continue;
        }
        for (const int64_t i : kept) winner.run(row, i, inverse);
      } else {
        winner.run(row, first, inverse);  // a good one first: the more are left out
        for (int64_t i = 0; i < v; ++i) winner.run(row, i, inverse);
      }
      tokens[r] = winner.token;
    }
  });
}

}  // extern "C"
