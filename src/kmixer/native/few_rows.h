// A few rows times a matrix of weights, each of which is read once and in the order of memory.
//
// Weights lie in panels of kPanel columns, one after the other: (panels, inputs, kPanel), behind each of them its biases,
// zero beyond the last column. They are asked for long before they are needed, beyond the end of a matrix too, where the
// next may lie. From memory, eight rows then take hardly longer than one; from a cache, hardly longer than their
// multiply-adds alone. Weights of 16 or 8 bits become floats in registers; those of 8 bits have a scale a column, which
// stands before the biases.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "elementwise.h"

namespace {

constexpr int64_t kPanel = 32;    // generation/operations.py packs as many, and pads the rows of all buffers to them
constexpr int64_t kAhead = 4096;  // weights: memory answers in the time that eight rows take for half of them
constexpr int kVectors = 2;
constexpr int64_t kPart = kVectors * kLanes;  // of a panel at once
#ifdef __AVX512F__
constexpr int64_t kMostRows = 12;  // whose sums are held in registers
#else
constexpr int64_t kMostRows = 6;
#endif

INLINE int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }
INLINE int64_t in_panels(int64_t columns) { return panels_of(columns) * kPanel; }

// What is added to where nothing is to be added.
constexpr float kNothing[kPanel] = {};

// Numbers at data + row * stride and the following.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  METHOD T* at(int64_t row) const { return data + row * stride; }
  METHOD Rows from(int64_t row, int64_t column) const { return {at(row) + column, stride}; }
  METHOD operator Rows<const T>() const { return {data, stride}; }
};

enum Precision : int64_t { kFloat32, kBFloat16, kInt8 };

INLINE Vector load(const int8_t* x) {  // which GCC 12 would convert one after the other
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x)));
#elif defined(__AVX2__)
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)x)));
#else
  typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
  typedef int32_t Numbers __attribute__((vector_size(4 * kLanes)));
  return __builtin_convertvector(__builtin_convertvector(*(const Bytes*)x, Numbers), Vector);
#endif
}

// What stands behind the weights of a panel, and the bytes of both.
template <class Weight>
INLINE const float* scales_of(const Weight* panel, int64_t inputs) {
  return (const float*)(panel + inputs * kPanel);
}
template <class Weight>
INLINE const float* biases_of(const Weight* panel, int64_t inputs) {
  return scales_of(panel, inputs) + (sizeof(Weight) == 1 ? kPanel : 0);
}
template <class Weight>
INLINE int64_t panel_bytes(int64_t inputs) {
  return kPanel * (inputs * sizeof(Weight) + (sizeof(Weight) == 1 ? 2 : 1) * sizeof(float));
}

// out = onto + in W + bias for some rows and one panel of columns.
template <class Weight>
struct Product {
  Rows<const float> in, onto;
  Rows<const Weight> weights;
  Rows<float> out;
  int64_t inputs;
  const char* ahead;  // kAgain: what is asked for, `step` bytes further on with every row of W
  int64_t step;
};

// Where weights lie: in a panel that is read once, in one that is read by several groups of rows, or in rows of a matrix
// that is no panel, without biases and onto nothing.
enum Where { kOnce, kAgain, kApart };

// A part of a panel. A fused multiply-add takes four cycles and two begin in each: few sums are several
// chains.
template <int rows, Where where, class Weight>
INLINE void multiply_part(const Product<Weight>& p, int64_t part) {
  constexpr int chains = rows == 1 ? 4 : rows < 4 ? 2 : 1;
  const int64_t stride = where == kApart ? p.weights.stride : kPanel, in_stride = p.in.stride, inputs = p.inputs;
  const int64_t out_stride = p.out.stride, onto_stride = p.onto.stride, step = p.step;
  const Weight* w = p.weights.data + part;
  const float *in = p.in.data, *onto = p.onto.data + part;
  const char* ahead = p.ahead + part / kPart * inputs * step;
  float* out = p.out.data + part;
  Vector sum[chains][rows][kVectors] = {};
  const auto add = [&](int64_t i, int c) {
    const Weight* from = w + i * stride;
    if (where == kAgain) __builtin_prefetch(ahead + i * step, 0, 2);
    Vector weight[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      if (where != kAgain) __builtin_prefetch(from + v * kLanes + (where == kOnce ? kAhead : kPanel));
      weight[v] = load(from + v * kLanes);
    }
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < kVectors; ++v) sum[c][r][v] += weight[v] * in[r * in_stride + i];
  };
  int64_t i = 0;
  for (; i + chains <= inputs; i += chains)
    for (int c = 0; c < chains; ++c) add(i + c, c);
  if (chains > 1)
    for (; i < inputs; ++i) add(i, 0);
  Vector scale[kVectors], bias[kVectors];
  for (int v = 0; v < kVectors && where != kApart; ++v) {
    if (sizeof(Weight) == 1) scale[v] = load(scales_of(p.weights.data, inputs) + part + v * kLanes);
    bias[v] = load(biases_of(p.weights.data, inputs) + part + v * kLanes);
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vector whole = sum[0][r][v];
      for (int c = 1; c < chains; ++c) whole += sum[c][r][v];
      if (sizeof(Weight) == 1) whole *= scale[v];
      if (where != kApart) whole += bias[v] + load(onto + r * onto_stride + v * kLanes);  // last: they may be large
      store(whole, out + r * out_stride + v * kLanes);
    }
}

template <int rows, Where where, class Weight>
void multiply_rows_of(const Product<Weight>& product) {
  for (int64_t part = 0; part < kPanel; part += kPart) multiply_part<rows, where>(product, part);
}

template <Where where, class Weight>
constexpr void (*kFewRows[])(const Product<Weight>&) = {
    multiply_rows_of<1, where, Weight>,  multiply_rows_of<2, where, Weight>,  multiply_rows_of<3, where, Weight>,
    multiply_rows_of<4, where, Weight>,  multiply_rows_of<5, where, Weight>,  multiply_rows_of<6, where, Weight>,
#ifdef __AVX512F__
    multiply_rows_of<7, where, Weight>,  multiply_rows_of<8, where, Weight>,  multiply_rows_of<9, where, Weight>,
    multiply_rows_of<10, where, Weight>, multiply_rows_of<11, where, Weight>, multiply_rows_of<12, where, Weight>,
#endif
};

// out = onto + in W + bias for one panel and any number of rows: more than the registers hold are groups of equal size,
// one after the other. They ask for the next panel, each for a part of it.
template <class Weight>
INLINE void multiply_panel(Rows<const float> in, const Weight* panel, int64_t inputs, Rows<const float> onto,
                           Rows<float> out, int64_t rows) {
  if (rows <= kMostRows)
    return kFewRows<kOnce, Weight>[rows - 1]({in, onto, {panel, kPanel}, out, inputs, nullptr, 0});
  const int64_t groups = (rows + kMostRows - 1) / kMostRows;
  const int64_t step = (kPart * int64_t(sizeof(Weight)) + groups - 1) / groups;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = rows * group / groups, count = rows * (group + 1) / groups - first;
    const char* ahead = (const char*)panel + panel_bytes<Weight>(inputs) + group * inputs * step * (kPanel / kPart);
    kFewRows<kAgain, Weight>[count - 1](
        {in.from(first, 0), onto.from(first, 0), {panel, kPanel}, out.from(first, 0), inputs, ahead, step});
  }
}

// out (rows, columns) = in times the first rows of W, which are whole panels wide; as many rows as registers hold.
INLINE void multiply_rows(Rows<const float> in, Rows<const float> weights, int64_t inputs, Rows<float> out,
                          int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kPanel)
    kFewRows<kApart, float>[rows - 1]({in, out, weights.from(0, j), out.from(0, j), inputs, nullptr, 0});
}

}  // namespace
