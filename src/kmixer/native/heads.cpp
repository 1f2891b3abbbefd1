// The heads of attention: slices of the channels of a row, put apart and together again, and turned by their positions
// on the way.

#include "common.h"

namespace {

// to = from, its channels (i, i + e/2) turned by an angle; as it is where there is no cosine.
INLINE void turn(const float* __restrict from, float* __restrict to, const float* cosine, const float* sine, int64_t e,
                 float direction) {
  if (cosine == nullptr) {
    std::memcpy(to, from, sizeof(float) * e);
    return;
  }
  const int64_t half = e / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = from[i], b = from[i + half], s = direction * sine[i];
    to[i] = a * cosine[i] - b * s;
    to[i + half] = b * cosine[i] + a * s;
  }
}

}  // namespace

extern "C" {

// The parts y (b, h, t, e) of x (b, t, parts h e), whose channels are those of part after part, head after head. The
// first `rotated` parts are turned by cosine and sine, t rows of e / 2 that lie `row` apart. `back`: x from the parts,
// turned back.
void heads_apart(float* x, float* const* y, const float* cosine, const float* sine, int64_t row, int64_t parts,
                 int64_t rotated, int64_t b, int64_t h, int64_t t, int64_t e, int64_t back, int64_t threads) {
  parallel(b * t, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t batch = at / t, i = at % t;
      float* together = x + at * parts * h * e;
      for (int64_t part = 0; part < parts; ++part) {
        const float* c = part < rotated ? cosine + i * row : nullptr;
        const float* s = part < rotated ? sine + i * row : nullptr;
        for (int64_t head = 0; head < h; ++head, together += e) {
          float* apart = y[part] + ((batch * h + head) * t + i) * e;
          if (back)
            turn(apart, together, c, s, e, -1.0f);
          else
            turn(together, apart, c, s, e, 1.0f);
        }
      }
    }
  });
}

}  // extern "C"
