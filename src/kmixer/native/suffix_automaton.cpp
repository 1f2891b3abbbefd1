// What followed the last time the latest tokens were seen, for whole rows and for rows that are stepped.

#include <memory>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "suffix_automaton.h"

namespace {

// The last `count` tokens of a row, up to and with the newest one, compared with themselves moved by every distance: of
// the longest common suffix that they have, of at most `most` tokens, the token that follows it, or -1. Z algorithm on
// the text read backward (Gusfield, Algorithms on Strings, 1997, 1.3); z has room for `count` numbers. O(count).
int64_t search(const int64_t* newest, int64_t count, int64_t most, int32_t* z, int64_t* length) {
  int64_t longest = 0, nearest = 0, begin = 0, end = 0;  // what begin..end is equal to stands at 0
  for (int64_t i = 1; i + longest < count && longest < most; ++i) {
    int64_t same = i < end ? std::min<int64_t>(end - i, z[i - begin]) : 0;
    if (i + same >= end) {
      while (i + same < count && newest[-same] == newest[-i - same]) ++same;
      begin = i;
      end = i + same;
    }
    z[i] = int32_t(same);
    if (same > longest) {
      longest = std::min(same, most);
      nearest = i;
    }
  }
  *length = longest;
  return longest ? newest[1 - nearest] : -1;
}

// Automata are read here and there: with small pages, their addresses alone would be many reads. Decoding 64 rows of
// 4,096 tokens takes 2 % less time with large ones.
void want_large_pages(int32_t* buffers, int64_t words) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t begin = (uintptr_t(buffers) + kPage - 1) / kPage * kPage;
  const uintptr_t end = uintptr_t(buffers + words) / kPage * kPage;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

struct Rows {
  const int64_t* text;
  const int64_t* before;
  int64_t *copied, *lengths;
  int64_t width, fresh, memory, longest;

  METHOD const int64_t* first(int64_t row) const { return text + (row + 1) * width - fresh; }

  void search_row(int64_t row, int32_t* z) const {
    int64_t count = before[row];
    for (int64_t i = 0; i < fresh; ++i) {
      if (count == memory) count /= 2;
      copied[row * fresh + i] = search(first(row) + i, ++count, longest, z, lengths + row * fresh + i);
    }
  }

  void step_row(int64_t row, int32_t* buffer, int64_t capacity) const {
    SuffixAutomaton automaton(buffer, capacity, longest);
    int32_t length;
    for (int64_t i = -before[row]; i < 0; ++i) automaton.push(int32_t(first(row)[i]), &length);
    for (int64_t i = 0; i < fresh; ++i) {
      copied[row * fresh + i] = automaton.push(int32_t(first(row)[i]), &length);
      lengths[row * fresh + i] = length;
    }
  }
};

}  // namespace

extern "C" {

// Words of int32 of a row that remembers up to `capacity` tokens.
int64_t suffix_automaton_words(int64_t capacity) { return SuffixAutomaton::words(capacity); }

// text (rows, width): what a row remembers, the last before[row] of the tokens there, and then its `fresh` new tokens;
// copied, lengths (rows, fresh). A row that remembers `memory` tokens drops the older half before the next; with a
// memory of -1, none. Matches are of `longest` tokens at most. With `searching`, every token costs O(width) and there is no automaton.
void suffix_matches(const int64_t* text, const int64_t* before, int64_t* copied, int64_t* lengths, int64_t rows,
                    int64_t width, int64_t fresh, int64_t memory, int64_t longest, int64_t searching,
                    int64_t threads) {
  const int64_t capacity = memory < 0 ? width : std::min(memory, width);
  const int64_t words = searching ? width : SuffixAutomaton::words(capacity);
  const Rows all = {text, before, copied, lengths, width, fresh, memory, longest};
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    const std::unique_ptr<int32_t[]> buffer(new int32_t[words]);
    for (int64_t row = begin; row < end; ++row)
      searching ? all.search_row(row, buffer.get()) : all.step_row(row, buffer.get(), capacity);
  });
}

// Rows that are stepped: buffers (rows, words) with words = suffix_automaton_words(capacity). text and before are those of
// suffix_matches, without new tokens.
void suffix_begin(int32_t* buffers, const int64_t* text, const int64_t* before, int64_t rows, int64_t words,
                  int64_t width, int64_t capacity, int64_t threads) {
  want_large_pages(buffers, rows * words);
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t row = begin; row < end; ++row) {
      SuffixAutomaton automaton(buffers + row * words, capacity, INT32_MAX);
      int32_t length;
      for (int64_t i = width - before[row]; i < width; ++i) automaton.push(int32_t(text[row * width + i]), &length);
    }
  });
}

// The next token of every row: tokens, copied, lengths (rows,).
void suffix_step(int32_t* buffers, const int64_t* tokens, int64_t* copied, int64_t* lengths, int64_t rows,
                 int64_t words, int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t row = begin; row < end; ++row) {
      int32_t length;
      copied[row] = SuffixAutomaton(buffers + row * words).push(int32_t(tokens[row]), &length);
      lengths[row] = length;
    }
  });
}

// text (rows, width): at its end the last counts[row] tokens that a row remembers, before them zeros.
void suffix_text(int32_t* buffers, const int64_t* counts, int64_t* text, int64_t rows, int64_t words, int64_t width,
                 int64_t threads) {
  parallel(rows, threads, [=](int64_t begin, int64_t end, int64_t) {
    for (int64_t row = begin; row < end; ++row) {
      const SuffixAutomaton automaton(buffers + row * words);
      const int32_t* last = automaton.text + automaton.header->count - counts[row];
      int64_t* to = text + (row + 1) * width - counts[row];
      std::memset(text + row * width, 0, sizeof(int64_t) * (width - counts[row]));
      for (int64_t i = 0; i < counts[row]; ++i) to[i] = last[i];
    }
  });
}

}  // extern "C"
