// The suffix automaton of a growing text, with the most recent end position of every state.
//
// A state stands for the strings that end at the same positions of the text; its link is the state of their longest
// suffixes that end at more. States, edges and the text lie in one flat buffer of int32 that the caller owns, so that a
// row can be kept, copied and stepped anywhere. State 0 is the empty string and stands for "none" in every field.
//
// After a token is pushed, the link of the newest state is the longest repeated suffix, and its end position, before
// the token counts, the most recent earlier occurrence. All states up the links then end here. In ordinary text these are
// few, and every one is written to. In a run of one token they are all states: an automaton that has walked over too many
// keeps paths instead, until it forgets. States that lately ended at the same position form a path of the link tree,
// which is a splay tree with that position at its root (Sleator and Tarjan's link-cut tree, J. Comput. Syst. Sci. 26,
// 1983). A token costs O(log n), amortised, whatever the text.
//
// Source of the automaton: Blumer et al., Theor. Comput. Sci. 40, 1985.
#pragma once

#include "common.h"

namespace {

// A walk over less than twice as many states is free, as it is over the log2 n states of random text of two tokens, where
// splaying takes five times as long; longer ones are counted in units of kWalk.
constexpr int32_t kWalk = 16;
constexpr int kAbove = 8;  // of the states above the newest, of which text has three to five

// A piece of a buffer as it was before it was written over.
struct Saved {
  int32_t* at;
  int32_t count, words[8];
};

// With `undoing`, what is written over is saved first.
template <bool undoing>
struct Automaton {
  struct Header {
    int32_t capacity, count, states, newest, shift, longest;
    int32_t walked;         // kWalk states, less one a token; 0 at least
    int32_t splayed;        // whether there are paths; without, `end` of every state is right
    int32_t above[kAbove];  // states up the links from the newest, up to 0: what `ask` goes by
  };
  struct Edge {  // all edges of a state but its first two: an entry of a hash table
    int32_t state, token, target, next;  // next: entry of the next edge of the state, plus 1
  };
  struct First {
    int32_t token, target;
  };
  struct State {  // two in a cache line
    int32_t length, link;
    int32_t end;   // the most recent end position
    int32_t more;  // entry of the third edge, plus 1
    First first[2];
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

  // Asks for memory that `push` of this token will read, `far` reads behind what it finds at once: the first edges of
  // the states above the newest, where they lead to, what followed there. To ask for many automata, nearest first, hides
  // the time that memory takes: each of these reads needs the one before.
  METHOD void ask(int32_t token, int far) const {
    if (far == 0) return __builtin_prefetch(header);
    if (far == 1) {
      __builtin_prefetch(states + header->newest);
      __builtin_prefetch(states + header->states);
      __builtin_prefetch(text + header->count);
    }
    for (const int32_t state : header->above) {
      if (far == 1) {
        __builtin_prefetch(states + state);
        __builtin_prefetch(edges + entry(state, token));
      } else if (const int32_t match = existing(state, token)) {
        if (far == 3) return __builtin_prefetch(text + states[match].end + 1);
        __builtin_prefetch(states + match);
      }
      if (state == 0) return;
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
    for (const First& edge : states[state].first)
      if (edge.token == token && edge.target) return edge.target;
    if (states[state].more == 0) return 0;
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
    header->count = header->newest = header->walked = header->splayed = 0;
    header->states = 1;
    std::memset(header->above, 0, sizeof(header->above));
    states[0] = {};
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
    for (First& edge : from.first) {
      if (edge.target == 0) edge.token = token;
      if (edge.token == token) return edge.target;
    }
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
    states[newest] = {t + 1, 0, t};
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
    *length = std::min(states[match].length, header->longest);
    if (header->splayed) paths[newest] = {0, 0, match, t};
    const int32_t end = header->splayed ? splay_here(match, t) : walk_here(match, t);
    return match ? text[end + 1] : -1;
  }

  // Of the strings of `longer`, those up to the length of `state` + 1 end where the newest state ends, too: they become
  // a state of their own, between `longer` and its link.
  int32_t split(int32_t longer, int32_t state, int32_t token) {
    const int32_t shorter = header->states++;
    State& from = states[longer];
    save(&from);
    states[shorter] = from;
    states[shorter].length = states[state].length + 1;
    states[shorter].more = 0;
    for (int32_t next = from.more; next; next = edges[next - 1].next)
      target(shorter, edges[next - 1].token) = edges[next - 1].target;
    from.link = shorter;
    for (;; state = states[state].link) {
      int32_t& to = target(state, token);
      if (to != longer) break;
      to = shorter;
      if (state == 0) break;
    }
    if (header->splayed) split_path(longer, shorter);
    return shorter;
  }

  METHOD void split_path(int32_t longer, int32_t shorter) {
    splay(longer);
    Path& below = paths[longer];
    save(&below);
    if (below.left) save(paths + below.left);
    paths[shorter] = {below.left, 0, below.parent, below.end};
    if (below.left) paths[below.left].parent = shorter;
    below.left = 0;
    below.parent = shorter;
  }

  // The states from this one up the links end at t. Returns where the longest string of the state, or the last `longest`
  // tokens of it, ended before.
  METHOD int32_t walk_here(int32_t state, int32_t t) {
    int32_t end = -1, count = 0;
    for (; state; state = states[state].link, ++count) {
      State& here = states[state];
      if (end < 0 && states[here.link].length < header->longest) end = here.end;
      save(&here);
      here.end = t;
      if (count < kAbove) header->above[count] = state;
    }
    if (count < kAbove) header->above[count] = 0;
    header->walked = std::max(header->walked + count / kWalk - 1, 0);
    if (header->walked > header->states) make_paths();
    return end;
  }

  // Every state is a path of its own. What is undone finds `splayed` as it was, and makes paths anew when it is time.
  void make_paths() {
    header->splayed = 1;
    paths[0] = {};
    for (int32_t state = 1; state < header->states; ++state) paths[state] = {0, 0, states[state].link, states[state].end};
  }

  // The same as walk_here: these states become one path.
  METHOD int32_t splay_here(int32_t state, int32_t t) {
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
