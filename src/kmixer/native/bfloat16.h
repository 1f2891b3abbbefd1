// Numbers of 16 bits: the upper half of a float32. Kernels read and write them, and compute in float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct BFloat16 {
  uint16_t bits;
};

static inline __attribute__((always_inline)) float widen(float x) { return x; }
static inline __attribute__((always_inline)) float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
static inline __attribute__((always_inline)) void narrow(float x, float* y) { *y = x; }
static inline __attribute__((always_inline)) void narrow(float x, BFloat16* y) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  y->bits = uint16_t(x == x ? rounded : 0x7fc0);
}

// f with a number of the type that a kernel's tensors have: bfloat16 where `bf16` holds, else float32.
template <class Function>
void of_element(int32_t bf16, Function f) {
  if (bf16)
    f(BFloat16{});
  else
    f(0.0f);
}

}  // namespace
