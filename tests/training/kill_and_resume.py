"""Kill a training run at random moments with SIGKILL, resume it each time, and compare it with an unbroken run.

    python tests/training/kill_and_resume.py --kills 10

Half of the kills wait until a file is being written, so that they fall into checkpoints. Weights,
optimiser state and metrics must be those of the unbroken run bit for bit (times excepted).
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tomli_w

TIMING_KEYS = ("seconds", "tokens_per_second")

RECIPE = {
    "name": "kill-and-resume",
    "description": "writes a checkpoint every other step",
    "tokenizer": {"kind": "char", "vocabulary_size": 90},
    "model": {"width": 64, "layers": 4, "rank": 4, "dropout": {"embedding": 0.1, "mlp": 0.1, "residual": 0.1}},
    "training": {
        "batch_size": 4,
        "window": 64,
        "optimizer": "muon",
        "learning_rate": 0.01,
        "muon_learning_rate": 0.02,
        "learning_rate_floor": 0.001,
        "warmup_steps": 2,
        "evaluate_every": 2,
        "log_every": 3,
    },
}


def start(recipe: Path, run: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kmixer", "train", str(recipe), "--out", str(run), "--cpu"]
    if (run / "recipe.toml").exists():
        command.append("--resume")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"training failed with exit code {process.returncode}: {errors.decode()}")


def being_written(run: Path) -> bool:
    return any(True for folder in (run, run / "checkpoints") for _ in folder.glob(".*.tmp"))


def step_of(run: Path) -> int:
    """The last step in metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1] if (run / "metrics.jsonl").exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else -1


def content(run: Path) -> dict[str, bytes]:
    """Everything a run learned, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in TIMING_KEYS} for line in lines]
    from kmixer.tensor_files import load_tensors

    tensors, _ = load_tensors(run / "checkpoints" / "last.safetensors")
    state = {name: tensor.reshape(-1).numpy().tobytes() for name, tensor in tensors.items()}
    return state | {
        "metrics": json.dumps(metrics).encode(),
        "model.safetensors": (run / "model.safetensors").read_bytes(),
    }


def kill_once(recipe: Path, run: Path, rng: random.Random, *, at_start: bool, in_a_write: bool, last_step: int) -> str:
    """Train until at least one new step is on record, go on for a random while, kill; where that was."""
    before = step_of(run)
    process = start(recipe, run)
    moment = time.monotonic() + rng.uniform(2, 4) if at_start else None  # imports, data, the first evaluation
    while process.poll() is None:
        now = time.monotonic()
        if moment is None and step_of(run) > before:
            moment = now + rng.uniform(0, 0.3)
        if moment is not None and now >= moment and (not in_a_write or being_written(run)):
            process.send_signal(signal.SIGKILL)
            process.wait()
            where = "while a file was written" if being_written(run) else "between writes"
            return f"killed after step {step_of(run)} of {last_step}, {where}"
    finish(process)
    return "finished before it could be killed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        topics = pydoc_data.topics.topics
        text = "\n".join(topics[key] for key in sorted(topics))
        (folder / "corpus.txt").write_text(text[:30_000], encoding="utf-8")
        values = RECIPE | {"data": {"corpus": str(folder / "corpus.txt")}}
        # A file that was being written a moment ago may be whole when the process dies: a few kills more, if need be.
        attempts = arguments.kills + 3
        steps = 40 * attempts + 40  # enough that no session reaches the end
        values["training"] = values["training"] | {"steps": steps}
        recipe = folder / "recipe.toml"
        recipe.write_text(tomli_w.dumps(values), encoding="utf-8")

        finish(start(recipe, folder / "whole"))
        kills = written = 0
        for index in range(attempts):
            if kills >= arguments.kills and (arguments.kills == 1 or written):
                break
            in_a_write = index % 2 == 1 or index >= arguments.kills
            said = kill_once(
                recipe, folder / "killed", rng, at_start=index == 0, in_a_write=in_a_write, last_step=steps
            )
            print(f"{index + 1}: {said}", flush=True)
            kills += said.startswith("killed")
            written += said.endswith("written")
        finish(start(recipe, folder / "killed"))

        whole, killed = content(folder / "whole"), content(folder / "killed")
        different = [name for name in sorted(whole.keys() | killed.keys()) if whole.get(name) != killed.get(name)]
        leftovers = [str(p) for p in (folder / "killed").rglob(".*.tmp")]
        if different or leftovers:
            raise SystemExit(f"not the unbroken run: {different or leftovers}")
        if kills < arguments.kills or (arguments.kills > 1 and not written):
            raise SystemExit(f"only {kills} kills, {written} of them in a write: nothing was shown")
        print(
            f"{kills} kills, {written} of them while a file was written: weights, optimiser and metrics are identical"
        )


if __name__ == "__main__":
    main()
