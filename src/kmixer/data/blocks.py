"""Cutting a text into blocks that encode by themselves, so that its length and its lines do not set the memory.

A cut function says how much of the beginning of a text may be encoded before the rest is known: 0 to wait for more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

Cut = Callable[[str], int]

# Characters of a word of byte pairs: merging takes time that grows faster than the length of a word.
LONGEST_WORD = 256
# Characters that are held back for a blank to come.
LONGEST_WAIT = 1 << 16
# White space as Unicode has it, written out: Python's \s and that of the tokenizers library differ in a few signs.
WHITE = "\\t-\\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# A word with the blanks before it, each of bounded length: no blank is parted from its word unless there are too many.
BOUNDED_WORD = f"[{WHITE}]{{0,{LONGEST_WORD - 1}}}[^{WHITE}]{{1,{LONGEST_WORD}}}|[{WHITE}]{{1,{LONGEST_WORD}}}"

_BOUNDED_WORD = re.compile(BOUNDED_WORD)
_BLANK_BEFORE_WORD = re.compile(r"[ \t\n\r](?=\S)")


def before_word(text: str) -> int:
    """Cut before the last blank that a word follows; in a word without end, where byte pairs cut it anyway."""
    for length in (1 << 10, LONGEST_WAIT):
        start = max(0, len(text) - length)
        cut = 0
        for blank in _BLANK_BEFORE_WORD.finditer(text, start):
            cut = blank.start()
        if cut:
            return cut
    if len(text) < LONGEST_WAIT:
        return 0
    cut = 0
    for word in _BOUNDED_WORD.finditer(text):  # the last may grow
        cut = word.start()
    return cut


def after_blank(text: str) -> int:
    """Cut after the last blank or line end; where there is none for long, at the end."""
    cut = max(text.rfind("\n"), text.rfind(" ")) + 1
    return cut or (len(text) if len(text) >= LONGEST_WAIT else 0)


def cut_blocks(blocks: Iterable[str], cut: Cut) -> Iterator[str]:
    """The same text in blocks that begin and end where `cut` says."""
    rest = ""
    for block in blocks:
        rest += block
        if end := cut(rest):
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def cut_line(line: str, characters: int) -> Iterator[str]:
    """A line in parts of so many characters at most, cut at blanks where there are any."""
    while len(line) > characters:
        cut = line.rfind(" ", 0, characters) + 1 or characters
        yield line[:cut]
        line = line[cut:]
    yield line
