"""The two ways a call can end that are not defects of kmixer: a wrong input, and a diverged run."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Characters of foreign text that a message shows, and of a whole message.
SHOWN_CHARACTERS = 200
LINE_CHARACTERS = 4000


class InputError(ValueError):
    """A wrong input: says in one line what was given, what is allowed and what to do.

    The command line prints the message alone and exits with code 2.
    """


class DivergedError(RuntimeError):
    """Training met a loss or gradient that is not finite. The command line exits with code 3."""


def check_choice(what: str, given: str, allowed: Iterable[str]) -> None:
    """Raises InputError where a name is none of the allowed ones."""
    if given not in (names := tuple(allowed)):
        raise InputError(f"{what}: got {shown(given)}; allowed: {', '.join(names)}")


def shown(value: object, limit: int = SHOWN_CHARACTERS) -> str:
    """A value that came from a file or a user, for a message: quoted, in one line, without control signs, cut.

    A text's line breaks and escape sequences are spelled out; past `limit` characters the number of all follows.
    """
    if isinstance(value, str):
        return repr(value) if len(value) <= limit else f"{value[:limit]!r}... ({len(value):,} characters)"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, a value nested too deeply
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def shown_name(name: object) -> str:
    """A key or a tensor's name for a message: as it is where it could be one of ours, otherwise quoted and cut."""
    plain = isinstance(name, str) and re.fullmatch(r"[\w./=,+-]{1,100}", name) is not None
    return str(name) if plain else shown(name)


def one_line(text: str, limit: int = LINE_CHARACTERS) -> str:
    """A message as a terminal may show it: line breaks and control signs spelled out, cut after `limit` characters."""
    cut = text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"
    # A non-breaking space is no harm, but U+202E, which turns what follows around, is: str.isprintable says both.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
