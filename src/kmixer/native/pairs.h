// What kernels of rows multiply, in float32 or bfloat16. Products of bfloat16 want pairs of numbers along their inner
// positions.
#pragma once

#include "gemm.h"

namespace {

INLINE Pair pair_of(BFloat16 first, BFloat16 second) { return {uint32_t(first.bits) | uint32_t(second.bits) << 16}; }

template <class T>
INLINE void pair_rows(const T* __restrict first, const T* __restrict second, Pair* __restrict to, int64_t columns) {
  for (int64_t j = 0; j < columns; ++j) {
    BFloat16 low, high;
    narrow(widen(first[j]), &low);
    narrow(widen(second[j]), &high);
    to[j] = pair_of(low, high);
  }
}

// Pairs of a matrix; what is beyond it is zero.
struct PairMatrix {
  std::vector<uint32_t> data;
  int64_t stride;

  PairMatrix(int64_t pairs, int64_t columns) : data(pairs * stride_of(columns)), stride(stride_of(columns)) {}
  Pair* row(int64_t i) { return (Pair*)&data[i * stride]; }
  const Pair* row(int64_t i) const { return (const Pair*)&data[i * stride]; }
};

// Of w (rows, columns), rounded: rows 2p and 2p + 1 as one row of pairs. B of a product whose inner positions are the rows.
INLINE PairMatrix paired_rows(const float* w, int64_t rows, int64_t columns) {
  PairMatrix to((rows + 1) / 2, columns);
  const std::vector<float> none(columns);
  for (int64_t i = 0; i < rows; i += 2)
    pair_rows(w + i * columns, i + 1 < rows ? w + (i + 1) * columns : none.data(), to.row(i / 2), columns);
  return to;
}

// The same of the transpose of w: columns 2p and 2p + 1 as one row.
INLINE PairMatrix paired_columns(const float* w, int64_t rows, int64_t columns) {
  PairMatrix to((columns + 1) / 2, rows);
  for (int64_t first = 0; first < rows; first += kPadding) {  // as many rows as stay in cache
    const int64_t last = std::min(first + kPadding, rows);
    for (int64_t j = 0; j < columns; j += 2)
      for (int64_t i = first; i < last; ++i) {
        BFloat16 low, high{0};
        narrow(w[i * columns + j], &low);
        if (j + 1 < columns) narrow(w[i * columns + j + 1], &high);
        to.row(j / 2)[i] = pair_of(low, high);
      }
  }
  return to;
}

// Up to `length` rows as operands of products: along their columns, and, once `pair` has been called, along the rows
// too. They are written into `row`, or taken from memory. `sums` is where a product may write as many rows of floats.
template <class T>
class RowTile;

template <>
class RowTile<float> {
 public:
  RowTile(int64_t length, int64_t columns)
      : columns_(columns), own_(length, columns), rows_(own_.row(0)), stride_(own_.stride) {}
  float* row(int64_t i) { return own_.row(i); }
  float* sums() { return own_.row(0); }
  int64_t sums_stride() const { return own_.stride; }
  void take(const float* rows, int64_t count) {
    const bool in_place = columns_ == padded(columns_);
    for (int64_t i = 0; !in_place && i < count; ++i) convert_row(rows + i * columns_, row(i), columns_);
    rows_ = in_place ? rows : own_.row(0);
    stride_ = in_place ? columns_ : own_.stride;
  }
  void pair(int64_t) {}
  Operand along_columns() const { return {rows_, stride_, 1}; }
  Operand along_rows() const { return {rows_, 1, stride_}; }
  const float* paired() const { return rows_; }
  int64_t paired_stride() const { return stride_; }

 private:
  int64_t columns_;
  Padded own_;
  const float* rows_;
  int64_t stride_;
};

template <>
class RowTile<BFloat16> {
 public:
  RowTile(int64_t length, int64_t columns)
      : columns_(columns),
        stride_(2 * stride_of((columns + 1) / 2)),
        rows_((length + length % 2) * stride_),
        pairs_((length + 1) / 2, columns),
        sums_(length, columns) {}
  BFloat16* row(int64_t i) { return &rows_[i * stride_]; }
  float* sums() { return sums_.row(0); }
  int64_t sums_stride() const { return sums_.stride; }
  void take(const BFloat16* rows, int64_t count) {
    for (int64_t i = 0; i < count; ++i) std::memcpy((void*)row(i), rows + i * columns_, sizeof(BFloat16) * columns_);
  }
  void pair(int64_t count) {
    if (count % 2) std::memset((void*)row(count), 0, sizeof(BFloat16) * columns_);
    for (int64_t i = 0; i < count; i += 2) pair_rows(row(i), row(i + 1), pairs_.row(i / 2), columns_);
  }
  PairOperand along_columns() const { return {(const Pair*)rows_.data(), stride_ / 2, 1}; }
  PairOperand along_rows() const { return {pairs_.row(0), 1, pairs_.stride}; }
  const Pair* paired() const { return pairs_.row(0); }
  int64_t paired_stride() const { return pairs_.stride; }

 private:
  int64_t columns_, stride_;
  std::vector<BFloat16> rows_;
  PairMatrix pairs_;
  Padded sums_;
};

// A matrix of weights (rows, columns) as B of a product whose inner positions are its rows, or its columns.
template <class T>
INLINE auto inner_rows(const float* w, int64_t rows, int64_t columns) {
  if constexpr (std::is_same_v<T, float>)
    return copy_of(w, rows, columns);
  else
    return paired_rows(w, rows, columns);
}

template <class T>
INLINE auto inner_columns(const float* w, int64_t rows, int64_t columns) {
  if constexpr (std::is_same_v<T, float>)
    return transpose_of(w, rows, columns);
  else
    return paired_columns(w, rows, columns);
}

}  // namespace
