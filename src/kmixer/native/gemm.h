// A matrix product for matrices that stay in cache: what the feed-forward and attention kernels are made of.
#pragma once

#include "common.h"

namespace {

// Sums held in registers: kRows rows of kParts vectors.
constexpr int kRows = 6;
#ifdef __AVX512F__
constexpr int kParts = 4;
#else
constexpr int kParts = 2;
#endif
// Inner positions of one pass: a panel of kParts vectors of B then fits the first cache level.
constexpr int64_t kInner = 128;

// Columns of padded matrices are whole multiples of this, on every processor.
constexpr int64_t kPadding = 16;

INLINE int64_t padded(int64_t columns) { return (columns + kPadding - 1) / kPadding * kPadding; }

// Rows of padded matrices start a cache line further on: rows a power of two apart would share cache sets.
INLINE int64_t stride_of(int64_t columns) { return padded(columns) + kPadding; }

// A (rows, columns) matrix whose rows are so far apart, zero beyond its columns.
struct Padded {
  std::vector<float> data;
  int64_t stride;

  Padded(int64_t rows, int64_t columns) : data(rows * stride_of(columns)), stride(stride_of(columns)) {}
  float* row(int64_t i) { return &data[i * stride]; }
  const float* row(int64_t i) const { return &data[i * stride]; }
};

INLINE Padded copy_of(const float* from, int64_t rows, int64_t columns) {
  Padded to(rows, columns);
  for (int64_t i = 0; i < rows; ++i) std::memcpy(to.row(i), from + i * columns, sizeof(float) * columns);
  return to;
}

INLINE Padded transpose_of(const float* from, int64_t rows, int64_t columns, float factor = 1) {
  Padded to(columns, rows);
  for (int64_t first = 0; first < rows; first += kPadding) {  // as many rows as stay in cache
    const int64_t last = std::min(first + kPadding, rows);
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = first; i < last; ++i) to.row(j)[i] = factor * from[i * columns + j];
  }
  return to;
}

template <class From, class To>
INLINE void convert_row(const From* __restrict from, To* __restrict to, int64_t width) {
  for (int64_t j = 0; j < width; ++j) narrow(widen(from[j]), &to[j]);
}

// Up to `length` rows of a tensor, `row` apart, as vectors of floats want them: in place where they are floats and `wide`
// already, else by way of a copy that is zero beyond their width.
template <class T>
class TileOf {
 public:
  TileOf(int64_t width, int64_t row, int64_t wide, int64_t length)
      : in_place_(std::is_same_v<T, float> && width == wide),
        width_(width),
        row_(row),
        tile_(in_place_ ? 0 : length, wide) {}
  int64_t stride() const { return in_place_ ? row_ : tile_.stride; }
  const float* take(const T* rows, int64_t count) {
    if (in_place_) return (const float*)rows;
    for (int64_t i = 0; i < count; ++i) convert_row(rows + i * row_, tile_.row(i), width_);
    return tile_.row(0);
  }
  float* place(T* rows) { return in_place_ ? (float*)rows : tile_.row(0); }
  // The same of one row, for sums: with what stands there already where `add` holds, else with zeros.
  float* begin(T* row, bool add) {
    float* sums = place(row);
    if (!add)
      std::fill(sums, sums + width_, 0.0f);
    else if (!in_place_)
      convert_row(row, sums, width_);
    return sums;
  }
  // What was written at `place(rows)`.
  void give(T* rows, int64_t count) const {
    for (int64_t i = 0; !in_place_ && i < count; ++i) convert_row(tile_.row(i), rows + i * row_, width_);
  }

 private:
  bool in_place_;
  int64_t width_, row_;
  Padded tile_;
};

using Tile = TileOf<float>;

// Two bfloat16 of a product that are next to each other along its inner positions, the first in the lower half. They may
// lie in memory as what they are.
struct __attribute__((may_alias)) Pair {
  uint32_t bits;
};
typedef Bits Pairs __attribute__((aligned(4), may_alias));

// A matrix operand: element (i, j) is at data[i * row + j * column]. Of pairs j counts pairs.
template <class T>
struct OperandOf {
  const T* data;
  int64_t row, column;
  METHOD OperandOf part(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
};
using Operand = OperandOf<float>;
using PairOperand = OperandOf<Pair>;

INLINE Vector lanes_of(const float* b) { return load(b); }
INLINE Pairs lanes_of(const Pair* b) { return *(const Pairs*)b; }

// sum + w x in every lane. A pair gives the sum of two products, each exact in float32.
INLINE Vector add_product(Vector sum, Vector w, float x) { return sum + w * x; }
INLINE Vector add_product(Vector sum, Pairs w, Pair x) {
#if defined(__AVX512BF16__)
  return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(int32_t(x.bits)));
#else
  return sum + (Vector)(w << 16) * widen(BFloat16{uint16_t(x.bits)}) +
         (Vector)(w & 0xffff0000u) * widen(BFloat16{uint16_t(x.bits >> 16)});
#endif
}

// What a product begins from: what stands in C, where `add` holds, or else nothing. Another kind of beginning has the
// same two members: of the block at (i, j) of C, and its first sums.
struct Onto {
  bool add;
  METHOD Onto at(int64_t, int64_t) const { return *this; }
  template <int rows, int parts>
  METHOD void begin(Vector (&sum)[rows][parts], const float* c, int64_t c_row) const {
    for (int r = 0; r < rows; ++r)
      for (int p = 0; p < parts; ++p) sum[r][p] = add ? load(c + r * c_row + p * kLanes) : Vector{};
  }
};

template <int rows, int parts, class T, class From>
INLINE void multiply_block(OperandOf<T> a, const T* b, int64_t b_row, int64_t inner, float* c, int64_t c_row,
                           From from) {
  Vector sum[rows][parts];
  from.begin(sum, c, c_row);
  const T* x = a.data;
  for (int64_t i = 0; i < inner; ++i, x += a.column, b += b_row) {
    decltype(lanes_of(b)) w[parts];
    for (int p = 0; p < parts; ++p) w[p] = lanes_of(b + p * kLanes);
    for (int r = 0; r < rows; ++r)
      for (int p = 0; p < parts; ++p) sum[r][p] = add_product(sum[r][p], w[p], x[r * a.row]);
  }
  for (int r = 0; r < rows; ++r)
    for (int p = 0; p < parts; ++p) store(sum[r][p], c + r * c_row + p * kLanes);
}

template <int parts, class T, class From>
INLINE void multiply_panel(OperandOf<T> a, const T* b, int64_t b_row, float* c, int64_t c_row, int64_t rows,
                           int64_t inner, From from) {
  int64_t i = 0;
  for (; i + kRows <= rows && i + kRows != rows - 2; i += kRows)  // eight rows are four and four, not six and two
    multiply_block<kRows, parts>(a.part(i, 0), b, b_row, inner, c + i * c_row, c_row, from.at(i, 0));
  for (; i + 4 <= rows; i += 4)
    multiply_block<4, parts>(a.part(i, 0), b, b_row, inner, c + i * c_row, c_row, from.at(i, 0));
  for (; i + 2 <= rows; i += 2)
    multiply_block<2, parts>(a.part(i, 0), b, b_row, inner, c + i * c_row, c_row, from.at(i, 0));
  for (; i < rows; ++i)
    multiply_block<1, parts>(a.part(i, 0), b, b_row, inner, c + i * c_row, c_row, from.at(i, 0));
}

// One pass of `multiply` over at most kInner inner positions.
template <class T, class From>
INLINE void multiply_pass(OperandOf<T> a, const T* b, int64_t b_row, float* c, int64_t c_row, int64_t rows,
                          int64_t inner, int64_t columns, From from) {
  int64_t j = 0;
  for (; j + kParts * kLanes <= columns; j += kParts * kLanes)
    multiply_panel<kParts>(a, b + j, b_row, c + j, c_row, rows, inner, from.at(0, j));
  if constexpr (kParts > 2)
    for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
      multiply_panel<2>(a, b + j, b_row, c + j, c_row, rows, inner, from.at(0, j));
  for (; j < columns; j += kLanes)
    multiply_panel<1>(a, b + j, b_row, c + j, c_row, rows, inner, from.at(0, j));
}

// C (rows, columns) = A (rows, inner) B (inner, columns), or C + A B where `add` holds. The rows of B and C
// are contiguous; columns is a multiple of 16.
template <class T>
INLINE void multiply_all(OperandOf<T> a, const T* b, int64_t b_row, float* c, int64_t c_row, int64_t rows,
                         int64_t inner, int64_t columns, bool add) {
  for (int64_t first = 0; first < inner; first += kInner)
    multiply_pass(a.part(0, first), b + first * b_row, b_row, c, c_row, rows, std::min(kInner, inner - first), columns,
                  Onto{add || first > 0});
}

INLINE void multiply(Operand a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t inner,
                     int64_t columns, bool add) {
  multiply_all(a, b, b_row, c, c_row, rows, inner, columns, add);
}

// The same with `inner` positions of bfloat16, pairs of which are the elements of A and B. An odd one is paired with 0.
INLINE void multiply(PairOperand a, const Pair* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t inner,
                     int64_t columns, bool add) {
  multiply_all(a, b, b_row, c, c_row, rows, (inner + 1) / 2, columns, add);
}

}  // namespace
