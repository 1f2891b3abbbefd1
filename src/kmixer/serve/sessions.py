"""Sessions: where a text stands that a client goes on with, by a name that the client gives it."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace

from kmixer.errors import InputError, shown
from kmixer.state import State, nbytes

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
TAIL = 64  # tokens: what follows them is decoded as after the whole text


@dataclass(frozen=True)
class Standing:
    """Where a text stands: the state after `position` tokens, and what comes after them but is not read yet.

    tail: the last tokens of all, the unread among them.
    """

    state: State
    position: int = 0
    unread: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Of the whole text."""
        return self.position + len(self.unread)


@dataclass
class _Session:
    standing: Standing
    nbytes: int
    used: float = field(default_factory=time.monotonic)
    busy: bool = False


class MissingError(InputError):
    """There is no session of this name."""


class BusyError(InputError):
    """A session is in use by another request."""


class Sessions:
    """Sessions by name, up to so many bytes; those that are used least recently go first, none that is in use."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sessions: OrderedDict[str, _Session] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Of the states of all."""
        return sum(session.nbytes for session in self._sessions.values())

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(self, name: str, initial: Standing) -> Standing:
        """Take a session, made where there is none, until `end`. Raises BusyError where somebody has it."""
        check_name(name)
        session = self._sessions.get(name)
        if session is None:
            self._sessions[name] = session = _Session(initial, nbytes(initial.state))
        if session.busy:
            raise BusyError(f"session {name}: another request is being answered; wait for it, or fork the session")
        session.busy = True
        return session.standing

    def end(self, name: str, standing: Standing | None) -> None:
        """Give a session back, standing elsewhere; of None it stands where it stood, and one that is new is dropped."""
        session = self._sessions[name]
        session.busy = False
        if standing is not None:
            self.put(name, standing)
        elif session.standing.tokens == 0:
            del self._sessions[name]

    def put(self, name: str, standing: Standing) -> None:
        """Let a session, made where there is none, stand here. Raises InputError where its state has no room."""
        check_name(name)
        size = nbytes(standing.state)
        if size > self._limit:
            raise InputError(
                f"session {name}: its state has {size:,} bytes; allowed: {self._limit:,}; serve with a larger "
                "--session-memory"
            )
        self._not_busy(name)
        self._sessions[name] = _Session(standing, size)
        self._sessions.move_to_end(name)
        excess = self.nbytes - self._limit
        for other, session in list(self._sessions.items()):
            if excess > 0 and other != name and not session.busy:
                excess -= session.nbytes
                del self._sessions[other]

    def fork(self, name: str, to: str) -> None:
        """Let another session stand where this one stands."""
        self.put(to, replace(self.standing(name)))

    def standing(self, name: str) -> Standing:
        """Where a session stands. Raises MissingError where there is none, BusyError while a request moves it."""
        self._get(name)
        self._not_busy(name)
        return self._sessions[name].standing

    def drop(self, name: str) -> None:
        """Forget a session."""
        self._get(name)
        self._not_busy(name)
        del self._sessions[name]

    def about(self, name: str) -> dict[str, object]:
        """Tokens, bytes and seconds since it was used last."""
        session = self._get(name)
        age = time.monotonic() - session.used
        return {
            "id": name, "object": "session", "tokens": session.standing.tokens, "bytes": session.nbytes,
            "age_seconds": round(age, 3), "busy": session.busy,
        }  # fmt: skip

    def _get(self, name: str) -> _Session:
        if (session := self._sessions.get(name)) is None:
            raise MissingError(f"session {shown(name)}: there is none; it was never made, dropped, or pushed out")
        return session

    def _not_busy(self, name: str) -> None:
        if name in self._sessions and self._sessions[name].busy:
            raise BusyError(f"session {name}: another request is being answered; wait for it, or fork the session")


def check_name(name: str) -> None:
    """Raises InputError for what cannot be the name of a session."""
    if not NAME.fullmatch(name):
        raise InputError(f"session: got {shown(name)}; allowed: 1 to 64 letters, digits, dots, dashes and underscores")
