"""The processes of a sweep: how many at once, on which processors, and how they stop."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kmixer.experiments.sweep import LOCK, SWEEP, Status, Sweep, SweepRun, check_sweep, sweep_runs
from kmixer.files import lock, write_json
from kmixer.runs.run_folder import RunFolder

POLL_SECONDS = 0.5
PR_SET_PDEATHSIG = 1
# Exit codes of `kmixer train` that are an end; anything else is a failure.
ENDS: dict[int, Status] = {0: "finished", 3: "diverged", 130: "waiting"}


def run_sweep(
    folder: Path,
    sweep: Sweep,
    *,
    workers: int,
    threads: int,
    options: list[str],
    report: Callable[[list[SweepRun]], None],
) -> list[SweepRun]:
    """Train every run of a sweep that has not ended, `workers` at a time with `threads` threads each.

    Args:
        folder: of the sweep; made, or the same sweep goes on in it.
        options: further options of `kmixer train`, for every run.
        report: called after every change and twice a second.

    Returns:
        The runs as they stand at the end. Some wait where the sweep was asked to stop (Ctrl-C, SIGTERM), all saved.

    Raises:
        InputError: the folder holds anything else, or the sweep is being run by another process.
    """
    check_sweep(folder, sweep)
    runs = sweep_runs(folder, sweep)
    held = lock(folder / LOCK, folder)
    write_json(folder / SWEEP, check_sweep(folder, sweep).model_dump())  # once more: seeds may have come meanwhile
    stopped: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: stopped.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    running: dict[int, tuple[SweepRun, subprocess.Popen[bytes]]] = {}  # by slot
    waiting = [run for run in runs if run.status == "waiting"]
    told = False
    try:
        while running or (waiting and not stopped):
            for slot in range(workers):
                if slot not in running and waiting and not stopped:
                    run = waiting.pop(0)
                    running[slot] = run, _start(run, sweep, slot, workers, threads, options, held)
                    run.status = "running"
            report(runs)
            if stopped and not told:
                told = True
                for _, process in running.values():
                    process.send_signal(signal.SIGINT)
            time.sleep(POLL_SECONDS)
            for slot, (run, process) in list(running.items()):
                if process.poll() is not None:
                    run.status = ENDS.get(process.returncode, "failed")
                    del running[slot]
        report(runs)
        return runs
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(held)


def log_of(run: SweepRun) -> Path:
    """What the run's process printed."""
    return run.path.with_name(f"{run.path.name}.log")


def _start(
    run: SweepRun, sweep: Sweep, slot: int, workers: int, threads: int, options: list[str], held: int
) -> subprocess.Popen[bytes]:
    run.path.parent.mkdir(parents=True, exist_ok=True)
    settings = [part for setting in run.settings for part in ("--set", setting)]
    resume = ["--resume"] if RunFolder(run.path).exists() else []
    begin_from = sweep.begin_from_of(run.seed)
    origin = [] if begin_from is None else ["--from", begin_from]
    command = [sys.executable, "-m", "kmixer", "train", sweep.recipe_of(run.seed), *settings, "--out", str(run.path)]
    processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    own = processors[slot * threads : (slot + 1) * threads] if workers * threads <= len(processors) else []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with log_of(run).open("ab") as log:
        return subprocess.Popen(
            [*command, *origin, *resume, *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on
            pass_fds=[held],
            preexec_fn=lambda: _settle(own),
        )


def _settle(processors: list[int]) -> None:
    """In the new process: stay on its processors, and be asked to stop when the sweep's process dies."""
    if processors:
        os.sched_setaffinity(0, processors)
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
