"""The online suffix automaton in Python, for machines without compiled kernels: the most recent match of every suffix.

A state stands for the strings that end at the same positions; its link is the state of their longest suffixes that end
at more (Blumer et al. 1985). Before token t counts, the end position of the newest state's link is the most recent
earlier occurrence of the longest repeated suffix; then all states up the links end at t. They are a few in ordinary
text, but all of them in a run of one token, which takes quadratic time here, and does not in native/suffix_automaton.h.
"""

from __future__ import annotations

from collections.abc import Iterable


class PythonAutomaton:
    """The automaton of a text that grows; of matches longer than `longest`, the last so many tokens count."""

    def __init__(self, text: Iterable[int], longest: int) -> None:
        self.longest = longest
        self.text: list[int] = []
        self.edges: list[dict[int, int]] = [{}]
        self.links = [-1]
        self.lengths = [0]
        self.ends = [-1]
        self.newest = 0
        for token in text:
            self.push(token)

    def push(self, token: int) -> tuple[int, int]:
        """Remember a token; what it copies, or -1, and the length of the match, or 0."""
        t = len(self.text)
        self.text.append(token)
        state, newest = self.newest, self._add({}, -1, t + 1, t)
        self.newest = newest
        while state >= 0 and token not in self.edges[state]:
            self.edges[state][token] = newest
            state = self.links[state]
        match = 0
        if state >= 0:
            match = self.edges[state][token]
            if self.lengths[match] > self.lengths[state] + 1:
                match = self._split(match, state, token)
        self.links[newest] = match
        if match == 0:
            return -1, 0
        length = min(self.lengths[match], self.longest)
        shortest = match  # of which the last `length` tokens are a suffix
        while self.lengths[self.links[shortest]] >= length:
            shortest = self.links[shortest]
        copied = self.text[self.ends[shortest] + 1]
        while match > 0:
            self.ends[match] = t
            match = self.links[match]
        return copied, length

    def _add(self, edges: dict[int, int], link: int, length: int, end: int) -> int:
        self.edges.append(edges)
        self.links.append(link)
        self.lengths.append(length)
        self.ends.append(end)
        return len(self.links) - 1

    def _split(self, longer: int, state: int, token: int) -> int:
        """A state of those strings of `longer` that end where the newest state ends, too, between it and its link."""
        length, end = self.lengths[state] + 1, self.ends[longer]
        shorter = self._add(dict(self.edges[longer]), self.links[longer], length, end)
        self.links[longer] = shorter
        while state >= 0 and self.edges[state].get(token) == longer:
            self.edges[state][token] = shorter
            state = self.links[state]
        return shorter
