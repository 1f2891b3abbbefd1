"""Thin the records of runs to what tables and figures are made of: python docs/runs/thin.py [FOLDER]

See README.md beside this file for what is dropped. Thinning again changes nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kmixer.files import write_text
from kmixer.runs.integrity import FILE_DIGESTS, OWN_DIGEST, RUN, sealed

# Recorded at every evaluation, drawn at the first and the last.
FIRST_AND_LAST = ("decay", "alpha", "base_kernel")
# What these hold between the first and the last evaluation is only drawn; all else stays as it was measured.
ROUNDED = ("dynamics", "gradient_norms", "update_norms", "stretches", "loss_by_position")
DIGITS = 5
# What binds results.json to the other files: made again, where it was there.
SEAL = {RUN, FILE_DIGESTS, OWN_DIGEST}
DROPPED = ("model.safetensors", "checkpoints/last.safetensors", "report.html")


def thin_metrics(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations; between the first and the last with fewer digits, and without what these two alone show."""
    first, *between, last = [line for line in lines if "validation" in line]
    for line in between:
        dynamics = line.get("dynamics", {})
        line["dynamics"] = {name: value for name, value in dynamics.items() if name not in FIRST_AND_LAST}
    return [first, *map(rounded, between), last]


def thin_results(results: dict[str, Any]) -> dict[str, Any]:
    """The results without the loss at each position of the last weights, which nothing draws."""
    last = {name: value for name, value in results["last"].items() if name != "loss_by_position"}
    whole: dict[str, Any] = rounded({**results, "last": last})
    return whole


def rounded(value: Any, inside: bool = False) -> Any:
    """The same values, numbers inside ROUNDED with DIGITS significant digits."""
    if isinstance(value, dict):
        return {name: rounded(one, inside or name in ROUNDED) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one, inside) for one in value]
    return float(f"{value:.{DIGITS}g}") if inside and isinstance(value, float) else value


def thin(run: Path) -> None:
    """Thin the record of one run in its place."""
    metrics, results = run / "metrics.jsonl", run / "results.json"
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    write_text(metrics, "".join(json.dumps(line) + "\n" for line in thin_metrics(lines)))
    for name in DROPPED:
        (run / name).unlink(missing_ok=True)
    if (run / "checkpoints").is_dir():
        (run / "checkpoints").rmdir()
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    environment["command"] = without_folder(environment["command"])
    write_text(run / "environment.json", json.dumps(environment, indent=2) + "\n")
    whole = json.loads(results.read_text(encoding="utf-8"))
    thinned = thin_results({name: value for name, value in whole.items() if name not in SEAL})
    write_text(results, json.dumps(sealed(run, thinned) if whole.keys() >= SEAL else thinned) + "\n")


def without_folder(command: list[str]) -> list[str]:
    """A command line without the folder of the corpora, which is that of one machine."""
    at = command.index("--data-dir") if "--data-dir" in command else len(command)
    return command[:at] + command[at + 2 :]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for results in sorted(folder.rglob("results.json")):
        thin(results.parent)


if __name__ == "__main__":
    main()
