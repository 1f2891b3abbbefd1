"""Sessions: one request at a time, forks, and the room they have."""

from __future__ import annotations

import pytest
import torch

from kmixer.errors import InputError
from kmixer.serve.sessions import BusyError, MissingError, Sessions, Standing


def standing(tokens: int = 1) -> Standing:
    return Standing(torch.zeros(1, 25), tokens)  # 100 bytes


def test_a_session_is_taken_by_one_at_a_time_and_stands_where_it_was_left() -> None:
    sessions = Sessions(1000)
    assert sessions.begin("a", standing(0)).tokens == 0
    for use in (lambda: sessions.begin("a", standing(0)), lambda: sessions.drop("a"), lambda: sessions.fork("a", "b")):
        with pytest.raises(BusyError, match=r"^session a: another request"):
            use()
    sessions.end("a", standing(7))
    assert sessions.standing("a").tokens == 7
    sessions.begin("a", standing(0))
    sessions.end("a", None)
    assert sessions.standing("a").tokens == 7
    sessions.begin("new", standing(0))
    sessions.end("new", None)
    with pytest.raises(MissingError, match=r"^session 'new': there is none"):
        sessions.standing("new")


def test_forks_go_their_own_ways() -> None:
    sessions = Sessions(1000)
    sessions.put("a", standing(3))
    sessions.fork("a", "b")
    sessions.put("b", standing(9))
    assert [sessions.standing(name).tokens for name in "ab"] == [3, 9]
    sessions.drop("a")
    assert len(sessions) == 1
    about = sessions.about("b")
    assert (about["tokens"], about["bytes"], about["busy"]) == (9, 100, False)


def test_the_least_recently_used_go_first_but_none_that_is_in_use() -> None:
    sessions = Sessions(300)
    for name in "abc":
        sessions.put(name, standing())
    sessions.begin("a", standing())
    sessions.put("d", standing())
    assert sessions.nbytes == 300
    assert sessions.about("a")["busy"]
    with pytest.raises(MissingError):
        sessions.standing("b")
    with pytest.raises(InputError, match=r"^session e: its state has 400 bytes; allowed: 300; .* --session-memory$"):
        sessions.put("e", Standing(torch.zeros(1, 100)))


@pytest.mark.parametrize("name", ["", "a/b", "ü", "x" * 65, "a b"])
def test_names_are_plain(name: str) -> None:
    with pytest.raises(InputError, match=r"^session: got .*; allowed: 1 to 64 letters"):
        Sessions(100).put(name, standing())
