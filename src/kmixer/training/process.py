"""What a process that trains sets for itself as a whole, and what training gives back as it was."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
# The end of the terminal, where the system has such terminals; Ctrl-C, and the request to end.
HANGUP = getattr(signal, "SIGHUP", None)
STOPS = [signal.SIGINT, signal.SIGTERM, *([] if HANGUP is None else [HANGUP])]


def settle_process() -> None:
    """Let this process keep the memory it frees, and take subnormal numbers for zero. Call it before the first tensor.

    Every step allocates and frees the same large tensors. glibc hands them back to the system each
    time and gets pages that must be cleared again, which takes a third of a training step on two cores.
    Float32 numbers below 1.2e-38 are computed in microcode, and a run whose gradients fade is full of them: at ten
    times its learning rate a refined stack made 2,500 tokens per second with them and 20,600 without.

    Settings of the whole process: for programs, not for libraries. The allocator is left alone where there is no
    glibc; threads that were there before keep their subnormal numbers.
    """
    torch.set_flush_denormal(True)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list that fills when the process is asked to stop; asked a second time in the same way, it stops at once.

    A hang-up that is ignored (nohup) stays so. In a thread, which no signal reaches, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    try:
        for number in STOPS:
            previous[number] = signal.getsignal(number)
            if number != HANGUP or previous[number] is not signal.SIG_IGN:
                signal.signal(number, note)
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """torch's random states, of the CPU and of a CUDA device, are afterwards what they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
