"""A process that is killed at the n-th change of the disk, played in this one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

# What changes names on the disk, or makes a change durable. pathlib, tempfile and shutil call these by these names.
CALLS = ("open", "rename", "replace", "unlink", "remove", "rmdir", "mkdir", "link", "symlink", "truncate", "fsync")


class KilledError(BaseException):
    """The process is dead: no `except Exception` sees it."""


class Disk:
    """Counts the calls that change the disk; dead from the n-th on, every one of them fails and changes nothing.

    Args:
        dies_at: the first call that is not made; None never.
        watch: called before every call, while the process lives.
    """

    def __init__(self, dies_at: int | None = None, watch: Callable[[], None] | None = None) -> None:
        self.dies_at, self.watch = dies_at, watch
        self.made: list[str] = []

    def _intercepted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def intercepted(*arguments: Any, **options: Any) -> Any:
            if name == "open":
                flags = options.get("flags", arguments[1] if len(arguments) > 1 else 0)
                if not flags & os.O_CREAT:
                    return call(*arguments, **options)
            if self.dies_at is not None and len(self.made) >= self.dies_at:
                raise KilledError
            if self.watch is not None:
                self.watch()
            self.made.append(name)
            return call(*arguments, **options)

        return intercepted


@contextmanager
def disk(dies_at: int | None = None, watch: Callable[[], None] | None = None) -> Iterator[Disk]:
    """Within it, changes of the disk are counted, and fail from the n-th on."""
    counted = Disk(dies_at, watch)
    patches = [mock.patch.object(os, name, counted._intercepted(name, getattr(os, name))) for name in CALLS]
    for patch in patches:
        patch.start()
    try:
        yield counted
    finally:
        for patch in patches:
            patch.stop()


def dies_at(number: int, action: Callable[[], object], watch: Callable[[], None] | None = None) -> bool:
    """Do something until its n-th change of the disk, where it is killed; False where it ends before that."""
    with disk(number, watch):
        try:
            action()
        except KilledError:
            return True
    return False
