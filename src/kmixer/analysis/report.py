"""One self-contained HTML page about runs and sweeps: what was learned, and whether it is better."""

from __future__ import annotations

import io
import shlex
from importlib import resources
from pathlib import Path

import jinja2
import matplotlib as mpl
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.figure import Figure

from kmixer.analysis.curves import ArmRuns, read_arm_runs
from kmixer.analysis.figures import all_figures
from kmixer.experiments.compare import arms_of, compare, measured_parts, why_not_comparable, without_results
from kmixer.experiments.learned import LEARNED, learned_table
from kmixer.experiments.sweep import SWEEP, Sweep, command_of
from kmixer.experiments.tables import cells, describe, headline, is_better
from kmixer.experiments.tables import head as head_of
from kmixer.files import atomic_write, plain_text, read_text
from kmixer.language_model import load
from kmixer.runs.run_folder import RECIPE, RunFolder

SAMPLE_TOKENS = 400
SAMPLE_SEED = 1

# What a reader should know about each figure, by the start of its name.
CAPTIONS = {
    "loss-curves": "Mean over the seeds; the band reaches from the smallest to the largest.",
    "final-losses": "A point a seed; the stroke is the mean. Each is the lowest of its run's evaluations.",
    "loss-by-position": "Best weights on the validation part: how much the text before helps.",
    "refinement": "A line a seed. eta is the learned step size; a residual that falls from step to step approaches an "
    "equilibrium.",
    "base-share": "Measured on validation text: |base| / (|base| + |decay|) in norm, first seed. The gate alone does "
    "not say it, since the kernel's own scale is free.",
    "decays": "A stroke a channel, first seed: how many positions back its memory reaches.",
    "base-kernel-matrix": "First seed: row i is what position i takes of the positions before it.",
    "base-kernel": "First seed.",
    "positions-over-training": "First seed: whether training goes on to use the text further back.",
    "bandwidths": "Gaussian attention, first seed: a small sigma keeps a token to itself and its like, a large one "
    "averages.",
    "class-token": "Validation images above; below, the weights of the class token on each patch, rolled out through "
    "all layers with half of each for the residual; first seed.",
    "levels": "Hierarchical attention, first seed: how much each level weighs, and how much of its scores' energy is "
    "symmetric; the rest is directional.",
    "level-approximation": "Hierarchical attention, first seed, mean over heads, Frobenius norms of unmasked scores; "
    "the nearest full attention is fitted on the features the layer sees.",
    "locality": "Measured on validation data, first seed: how many keys a head attends to, and how far away.",
    "norms": "Before clipping, by the groups of the author's optimiser, first seed.",
}


def write_report(paths: list[Path], out: Path, figures: Path | None = None) -> None:
    """Write the page, and each figure as SVG and PNG where a folder for them is given."""
    arms = read_arm_runs(paths)
    drawn = all_figures(arms)
    all_arms = arms_of(paths)
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
        figures=[(name, _svg(figure), _caption(name)) for name, figure in drawn.items()],
        samples=[(arm.name, _sample(arm)) for arm in arms if arm.unit == "tokens" and arm.has_weights],
        recipe=read_text(arms[0].runs[0].path / RECIPE),
        environment=_environment(arms),
        reproduce=[_command(path) for path in paths],
    )
    with atomic_write(out) as file:
        file.write(page.encode())
    if figures is not None:
        for name, figure in drawn.items():
            for suffix in ("svg", "png"):
                with atomic_write(figures / f"{name}.{suffix}") as file:
                    figure.savefig(file, format=suffix, dpi=200)


def _svg(figure: Figure) -> Markup:
    """The figure as SVG for the page: text as text, no background, no header of its own."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kmixer"}):
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])


def _caption(name: str) -> str:
    return next((text for start, text in CAPTIONS.items() if name.startswith(start)), "")


def _sample(arm: ArmRuns) -> str:
    """Text by the best weights of the arm's first run, after a line break or a full stop, as far as its window goes."""
    model = load(arm.runs[0].path)
    assert model.tokenizer is not None
    starts = [model.tokenizer.encode(text) for text in "\n." if not model.tokenizer.unknown(text)]
    # Pieces of words know no line break; a vocabulary without either begins with its first token.
    start = next((tokens for tokens in starts if len(tokens)), np.zeros(1, dtype=np.int64))
    prompt = torch.from_numpy(start)[None]
    limit = SAMPLE_TOKENS if model.config.max_positions is None else model.config.max_positions - prompt.shape[1]
    tokens = model.generate(prompt, max_new_tokens=min(SAMPLE_TOKENS, limit), temperature=0.8, seed=SAMPLE_SEED)
    return model.tokenizer.decode(tokens[0, prompt.shape[1] :].tolist())


def _environment(arms: list[ArmRuns]) -> list[tuple[str, str]]:
    found = arms[0].runs[0].environment()
    packages = ", ".join(f"{name} {version}" for name, version in found.pop("packages").items())
    for key in ("command", "resumed"):
        found.pop(key, None)
    runs = [run for arm in arms for run in arm.runs]
    for key, name in (("device", "device"), ("threads", "threads"), ("commit", "commits")):
        del found[key]
        found[name] = ", ".join(dict.fromkeys(value for run in runs for value in run.made_with(key)))
    return [*((key, str(value)) for key, value in found.items()), ("packages", packages)]


def _command(path: Path) -> str:
    """The command line of a run, or that of a sweep and its sweep.json."""
    if (path / SWEEP).is_file():
        return f"{command_of(Sweep.read(path))}\n{read_text(path / SWEEP)}"
    return shlex.join(RunFolder(path).environment()["command"])
