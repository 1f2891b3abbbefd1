// The suffix automaton of a growing text, with the most recent end position of every state.
//
// A state stands for the strings that end at the same positions of the text; its link is the state of their longest
// suffixes that end at more. States, edges and the text lie in one flat buffer of int32 that the caller owns, so that a
// row can be kept, copied and stepped anywhere. State 0 is the empty string and stands for "none" in every field.
//
// After a token is pushed, the link of the newest state is the longest repeated suffix, and its end position, before
// the token counts, the most recent earlier occurrence. All states up the links then end here. That way has a few states
// in ordinary text and all of them in a run of one token, so it is not walked: states that lately ended at the same
// position form a path of the link tree, which is a splay tree with that position at its root (Sleator and Tarjan's
// link-cut tree, J. Comput. Syst. Sci. 26, 1983). A token costs O(log n), amortised, whatever the text.
//
// Source of the automaton: Blumer et al., Theor. Comput. Sci. 40, 1985.
#pragma once

#include "common.h"

namespace {

// A piece of a buffer as it was before it was written over.
struct Saved {
  int32_t* at;
  int32_t count, words[5];
};

// With `undoing`, what is written over is saved first.
template <bool undoing>
struct Automaton {
  struct Header {
    int32_t capacity, count, states, newest, shift, longest, unused[10];
  };
  struct Edge {  // all edges of a state but its first: an entry of a hash table
    int32_t state, token, target, next;  // next: entry of the next edge of the state, plus 1
  };
  struct State {
    int32_t length, link;
    int32_t token, target, more;  // the first edge, and the entry of the next, plus 1
  };
  struct Path {  // of a splay tree, ordered by length; the parent of a root is the link of its shortest state
    int32_t left, right, parent;
    int32_t end;  // at the root: the most recent end position of all states of the path
  };

  Header* header;
  Edge* edges;
  State* states;
  Path* paths;
  int32_t* text;
  std::vector<Saved>* saved = nullptr;

  // A text of n tokens has at most 2 n states, and at most n edges that are not the first of their state.
  static int64_t entries(int64_t capacity) {
    int64_t entries = 2;
    while (entries < 2 * capacity) entries *= 2;
    return entries;
  }

  // Numbers of int32 of a buffer that remembers up to `capacity` tokens, in whole cache lines.
  static int64_t words(int64_t capacity) {
    const int64_t words = (sizeof(Header) + entries(capacity) * sizeof(Edge) +
                           (2 * capacity + 1) * (sizeof(State) + sizeof(Path)) + capacity * 4) / 4;
    return (words + 15) / 16 * 16;
  }

  // A buffer that `reset` has seen.
  explicit Automaton(int32_t* buffer) { take(buffer, ((Header*)buffer)->capacity); }

  // A buffer of words(capacity) that remembers nothing. When `capacity` tokens are remembered, the next one drops the
  // older half; where nothing may be dropped, the capacity is the length of the whole text. Of matches longer than
  // `longest`, the last so many tokens count.
  Automaton(int32_t* buffer, int64_t capacity, int64_t longest) {
    take(buffer, capacity);
    header->capacity = int32_t(capacity);
    header->longest = int32_t(longest);
    header->shift = 32 - __builtin_ctzll(entries(capacity));
    clear();
  }

  // Remembers a token. Returns the one that followed the most recent earlier occurrence of the longest suffix that
  // occurred before, or -1, and sets the length of that suffix.
  METHOD int32_t push(int32_t token, int32_t* length) {
    if (full()) drop_half();
    return insert(token, length);
  }

  METHOD bool full() const { return header->count == header->capacity; }

  // Asks for memory that `push` of this token will read, `far` reads behind what it finds at once. To ask for many
  // automata, nearest first, hides the time that memory takes: each of these reads needs the one before.
  METHOD void ask(int32_t token, int far) const {
    if (far == 0) return __builtin_prefetch(header);
    if (far == 1) {
      __builtin_prefetch(states + header->newest);
      __builtin_prefetch(states + header->states);
      __builtin_prefetch(paths + header->states);
      return __builtin_prefetch(text + header->count);
    }
    int32_t state = states[header->newest].link, match = 0;
    for (far -= 2; far > 0; far -= 1) {
      match = existing(state, token);
      if (match || state == 0) break;
      state = states[state].link;
    }
    if (far == 0) {
      __builtin_prefetch(states + state);
      return __builtin_prefetch(edges + entry(state, token));
    }
    for (far -= 1; far > 0 && match; far -= 1) match = paths[match].parent;
    if (match) {
      __builtin_prefetch(states + match);
      __builtin_prefetch(paths + match);
    }
  }

 private:
  // To be called before an entry that was there before this token is written over.
  template <class Entry>
  METHOD void save(Entry* entry) {
    if constexpr (undoing) {
      static_assert(sizeof(Entry) <= sizeof(Saved::words));
      Saved before = {(int32_t*)entry, sizeof(Entry) / 4, {}};
      std::memcpy(before.words, entry, sizeof(Entry));
      saved->push_back(before);
    }
  }

  METHOD uint32_t entry(int32_t state, int32_t token) const {
    return (uint32_t(state) * 0x9E3779B1u + uint32_t(token) * 0x85EBCA6Bu) * 0xC2B2AE35u >> header->shift;
  }

  // The target of a state's edge, or 0.
  METHOD int32_t existing(int32_t state, int32_t token) const {
    if (states[state].token == token) return states[state].target;
    const uint32_t mask = (uint32_t(1) << (32 - header->shift)) - 1;
    for (uint32_t at = entry(state, token); edges[at].target; at = (at + 1) & mask)
      if (edges[at].state == state && edges[at].token == token) return edges[at].target;
    return 0;
  }

  METHOD void take(int32_t* buffer, int64_t capacity) {
    header = (Header*)buffer;
    edges = (Edge*)(header + 1);
    states = (State*)(edges + entries(capacity));
    paths = (Path*)(states + 2 * capacity + 1);
    text = (int32_t*)(paths + 2 * capacity + 1);
  }

  METHOD void clear() {
    header->count = header->newest = 0;
    header->states = 1;
    states[0] = {};
    paths[0] = {};
    std::memset(edges, 0, sizeof(Edge) * entries(header->capacity));
  }

  void drop_half() {
    const int32_t kept = header->count / 2;
    const int32_t* from = text + header->count - kept;
    clear();
    for (int32_t i = 0, length; i < kept; ++i) insert(from[i], &length);
  }

  // The target of a state's edge. One that does not exist is made, with target 0, which the caller must set.
  METHOD int32_t& target(int32_t state, int32_t token) {
    State& from = states[state];
    save(&from);
    if (from.target == 0) from.token = token;
    if (from.token == token) return from.target;
    const uint32_t mask = (uint32_t(1) << (32 - header->shift)) - 1;
    uint32_t at = entry(state, token);
    for (; edges[at].target; at = (at + 1) & mask)
      if (edges[at].state == state && edges[at].token == token) {
        save(edges + at);
        return edges[at].target;
      }
    save(edges + at);
    edges[at] = {state, token, 0, from.more};
    from.more = int32_t(at) + 1;
    return edges[at].target;
  }

  int32_t insert(int32_t token, int32_t* length) {
    const int32_t t = header->count++, newest = header->states++;
    text[t] = token;
    states[newest] = {t + 1, 0, 0, 0, 0};
    int32_t state = header->newest, match = 0;
    header->newest = newest;
    for (;; state = states[state].link) {
      int32_t& to = target(state, token);
      if (to != 0) {
        match = to;
        break;
      }
      to = newest;
      if (state == 0) break;
    }
    if (match && states[match].length != states[state].length + 1) match = split(match, state, token);
    states[newest].link = match;
    paths[newest] = {0, 0, match, t};
    *length = std::min(states[match].length, header->longest);
    return match ? text[end_here(match, t) + 1] : -1;
  }

  // Of the strings of `longer`, those up to the length of `state` + 1 end where the newest state ends, too: they become
  // a state of their own, between `longer` and its link.
  int32_t split(int32_t longer, int32_t state, int32_t token) {
    const int32_t shorter = header->states++;
    State& from = states[longer];
    save(&from);
    states[shorter] = {states[state].length + 1, from.link, from.token, from.target, 0};
    for (int32_t next = from.more; next; next = edges[next - 1].next)
      target(shorter, edges[next - 1].token) = edges[next - 1].target;
    from.link = shorter;
    for (;; state = states[state].link) {
      int32_t& to = target(state, token);
      if (to != longer) break;
      to = shorter;
      if (state == 0) break;
    }
    splay(longer);
    Path& below = paths[longer];
    save(&below);
    if (below.left) save(paths + below.left);
    paths[shorter] = {below.left, 0, below.parent, below.end};
    if (below.left) paths[below.left].parent = shorter;
    below.left = 0;
    below.parent = shorter;
    return shorter;
  }

  // The states from this one up the links become one path, which ends at t. Returns where the longest string of the
  // state, or the last `longest` tokens of it, ended before.
  METHOD int32_t end_here(int32_t state, int32_t t) {
    int32_t below = 0, end = -1;
    for (int32_t top = state; top; top = paths[top].parent) {
      splay(top);
      if (end < 0 && states[paths[top].parent].length < header->longest) end = paths[top].end;
      if (const int32_t rest = paths[top].right) {
        save(paths + rest);
        paths[rest].end = paths[top].end;
      }
      save(paths + top);
      paths[top].right = below;
      below = top;
    }
    splay(state);
    save(paths + state);
    paths[state].end = t;
    return end;
  }

  METHOD bool is_root(int32_t state) const {
    const int32_t parent = paths[state].parent;
    return parent == 0 || (paths[parent].left != state && paths[parent].right != state);
  }

  METHOD void rotate(int32_t state) {
    const int32_t parent = paths[state].parent, above = paths[parent].parent;
    save(paths + state);
    save(paths + parent);
    save(paths + above);
    if (is_root(parent)) paths[state].end = paths[parent].end;
    else (paths[above].left == parent ? paths[above].left : paths[above].right) = state;
    paths[state].parent = above;
    paths[parent].parent = state;
    const bool left = paths[parent].left == state;
    const int32_t inner = left ? paths[state].right : paths[state].left;
    (left ? paths[state].right : paths[state].left) = parent;
    (left ? paths[parent].left : paths[parent].right) = inner;
    if (inner) {
      save(paths + inner);
      paths[inner].parent = parent;
    }
  }

  METHOD void splay(int32_t state) {
    while (!is_root(state)) {
      const int32_t parent = paths[state].parent;
      if (!is_root(parent)) {
        const int32_t above = paths[parent].parent;
        rotate((paths[above].left == parent) == (paths[parent].left == state) ? parent : state);
      }
      rotate(state);
    }
  }
};

using SuffixAutomaton = Automaton<false>;

// Pushes n tokens, f(t, copied, length) of each, and leaves the buffer as it was. A half that is dropped on the way is a
// copy of the whole buffer; that happens once in so many tokens.
template <class Function>
INLINE void without_trace(int32_t* buffer, int64_t words, const int64_t* tokens, int64_t n, Function f) {
  thread_local std::vector<Saved> saved;
  thread_local std::vector<int32_t> whole;
  saved.clear();
  Automaton<true> undoing(buffer);
  undoing.saved = &saved;
  const auto header = *undoing.header;
  bool dropped = false;
  for (int64_t t = 0; t < n; ++t) {
    if (!dropped && undoing.full()) {
      whole.assign(buffer, buffer + words);
      dropped = true;
    }
    int32_t length;
    const int32_t token = int32_t(tokens[t]);
    const int64_t copied = dropped ? SuffixAutomaton(buffer).push(token, &length) : undoing.push(token, &length);
    f(t, copied, length);
  }
  if (dropped) std::memcpy(buffer, whole.data(), sizeof(int32_t) * words);
  for (auto before = saved.rbegin(); before != saved.rend(); ++before)
    std::memcpy(before->at, before->words, sizeof(int32_t) * before->count);
  *undoing.header = header;
}

}  // namespace
