"""One self-contained HTML page about runs and sweeps: what was learned, and whether it is better."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path

import jinja2
import numpy as np
import torch
from markupsafe import Markup

from kmixer.analysis.figure_files import svg_element, write_figure
from kmixer.analysis.figures import all_figures
from kmixer.errors import InputError
from kmixer.experiments.arms import Arm, arms_of
from kmixer.experiments.compare import compare, measured_parts, why_not_comparable, without_results
from kmixer.experiments.learned import LEARNED, learned_table
from kmixer.experiments.sweep import SWEEP, Sweep, command_of
from kmixer.experiments.tables import cells, describe, headline, is_better
from kmixer.experiments.tables import head as head_of
from kmixer.files import atomic_write, plain_text, read_text
from kmixer.language_model import load
from kmixer.runs.run_folder import RECIPE, RunFolder

SAMPLE_TOKENS = 400
SAMPLE_SEED = 1


def write_report(paths: list[Path], out: Path, figures: Path | None = None) -> None:
    """Write the page, and each figure as SVG and PNG where a folder for them is given.

    Raises InputError where a path is neither a run nor a sweep, or no run has begun.
    """
    all_arms = arms_of(paths)
    arms = [arm for arm in all_arms if arm.begun]
    if not arms:
        raise InputError(f"{', '.join(map(str, paths))}: no run has begun yet")
    drawn = all_figures(arms)
    ended = [arm for arm in all_arms if arm.results]
    tables = [compare(all_arms, part) for part in measured_parts(ended)] if ended else []
    learned_head, learned = learned_table(all_arms)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (resources.files("kmixer.analysis") / "report.html").read_text(encoding="utf-8")
    )
    page = template.render(
        title=plain_text(" · ".join(path.name for path in paths)),
        tables=tables,
        headline=headline(tables[0]) if tables else "",
        warning=why_not_comparable(all_arms),
        head=head_of,
        cells=cells,
        is_better=is_better,
        describe=describe,
        without_results=without_results(all_arms) if ended else [],
        unfinished=sum(arm.unfinished - arm.diverged for arm in all_arms),
        learned_head=learned_head,
        learned=learned,
        about_learned=LEARNED,
        figures=[(name, Markup(svg_element(figure)), caption) for name, caption, figure in drawn],
        samples=[(arm.name, _sample(arm)) for arm in arms if arm.unit == "tokens" and arm.has_weights],
        recipe=read_text(arms[0].begun[0].path / RECIPE),
        environment=_environment(arms),
        reproduce=[_command(path) for path in paths],
    )
    with atomic_write(out) as file:
        file.write(page.encode())
    if figures is not None:
        for name, _, figure in drawn:
            for suffix in ("svg", "png"):
                write_figure(figure, figures / f"{name}.{suffix}")


def _sample(arm: Arm) -> str:
    """Text by the best weights of the arm's first run, after a line break or a full stop, as far as its window goes."""
    model = load(arm.begun[0].path)
    assert model.tokenizer is not None
    starts = [model.tokenizer.encode(text) for text in "\n." if not model.tokenizer.unknown(text)]
    # Pieces of words know no line break; a vocabulary without either begins with its first token.
    start = next((tokens for tokens in starts if len(tokens)), np.zeros(1, dtype=np.int64))
    prompt = torch.from_numpy(start)[None]
    limit = SAMPLE_TOKENS if model.config.max_positions is None else model.config.max_positions - prompt.shape[1]
    tokens = model.generate(prompt, max_new_tokens=min(SAMPLE_TOKENS, limit), temperature=0.8, seed=SAMPLE_SEED)
    return model.tokenizer.decode(tokens[0, prompt.shape[1] :].tolist())


def _environment(arms: list[Arm]) -> list[tuple[str, str]]:
    about = arms[0].begun[0].environment()
    packages = ", ".join(f"{name} {version}" for name, version in about.pop("packages").items())
    for key in ("command", "resumed"):
        about.pop(key, None)
    runs = [run for arm in arms for run in arm.begun]
    for key, name in (("device", "device"), ("threads", "threads"), ("commit", "commits")):
        del about[key]
        about[name] = ", ".join(dict.fromkeys(value for run in runs for value in run.made_with(key)))
    return [*((key, str(value)) for key, value in about.items()), ("packages", packages)]


def _command(path: Path) -> str:
    """The command line of a run, or that of a sweep and its sweep.json."""
    if (path / SWEEP).is_file():
        return f"{command_of(Sweep.read(path))}\n{read_text(path / SWEEP)}"
    return shlex.join(RunFolder(path).environment()["command"])
