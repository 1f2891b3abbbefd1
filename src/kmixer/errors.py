"""The two ways a call can end that are not defects of kmixer: a wrong input, and a diverged run."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """A wrong input: says in one line what was given, what is allowed and what to do.

    The command line prints the message alone and exits with code 2.
    """


class DivergedError(RuntimeError):
    """Training met a loss or gradient that is not finite. The command line exits with code 3."""


def check_choice(what: str, given: str, allowed: Iterable[str]) -> None:
    """Raises InputError where a name is none of the allowed ones."""
    if given not in (names := tuple(allowed)):
        raise InputError(f"{what}: got {given!r}; allowed: {', '.join(names)}")
