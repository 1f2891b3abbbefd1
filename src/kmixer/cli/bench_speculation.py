"""kmixer bench speculate: what a draft is worth to a run."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import typer

from kmixer.bench.measure import settle
from kmixer.bench.speculation import SpeculationSizes, bench_speculation
from kmixer.cli.bench_report import print_report, print_table
from kmixer.cli.drafting import drafts_of, speculation_of
from kmixer.cli.options import (
    Accept,
    Bound,
    DataDir,
    Delta,
    Draft,
    ExactGamma,
    Json,
    Mix,
    Repeats,
    Run,
    Threads,
)
from kmixer.generation.sampling import Sampling
from kmixer.language_model import load
from kmixer.measure.texts import held_out
from kmixer.runs.run_folder import RunFolder

SIZES = SpeculationSizes()
COLUMNS = {
    "cost": {"tokens read": "n", "ms": "seconds", "x step": "relative", "rows ms": "rows_seconds"},
    "acceptance": {
        "positions": "positions", "proposed": "proposed", "exact": "exact", "coupled": "coupled", "rule": "rule"
    },
    "gain": {
        "drafted": "m", "kept": "mean_kept", "acceptance": "acceptance", "predicted x": "predicted",
        "measured x": "measured", "tokens/s": "tokens_per_second", "nats": "verifier_nll",
    },
}  # fmt: skip


def speculate(
    run: Run,
    draft: Draft = "ngram:5",
    drafted: Annotated[
        list[int] | None, typer.Option("--draft-tokens", metavar="M", help="Tokens of a round; may be given again.")
    ] = None,
    accept: Accept = "coupled",
    delta: Delta = None,
    bound: Bound = None,
    mix: Mix = None,
    exact_gamma: ExactGamma = False,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of total probability p.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = SIZES.context,
    positions: Annotated[int, typer.Option(help="Positions of the acceptance.")] = SIZES.positions,
    tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = SIZES.tokens,
    corpus: Annotated[str | None, typer.Option(help="Where the run's own data is now, if it was moved.")] = None,
    data_dir: DataDir = None,
    threads: Threads = 1,
    repeats: Repeats = SIZES.repeats,
    as_json: Json = False,
) -> None:
    """Time decoding with a draft beside plain decoding: what a chunk costs, what is accepted, the gain by m.

    On the validation part of a run. The gain is predicted from the costs and the acceptance, and measured.

    Example: kmixer bench speculate runs/shakespeare-quick-seed42 --draft ngram:5
    """
    assert draft is not None
    sizes = SpeculationSizes(context, positions, tokens, tuple(drafted or SIZES.drafted), repeats)
    sizes.check()
    speculation = speculation_of(accept, delta=delta, bound=bound, mix=mix, exact_gamma=exact_gamma)
    sampling = Sampling(temperature, top_k, top_p)
    settle(threads)
    model = load(run)
    assert model.tokenizer is not None
    _, held = held_out(RunFolder(run), model.tokenizer, corpus, data_dir)
    text = torch.from_numpy(np.asarray(held.tokens[: context + positions]).astype(np.int64))
    make_draft = drafts_of(model, draft, speculation, corpus, data_dir)
    rows = bench_speculation(model, make_draft, text, speculation, sampling, sizes)
    if as_json:
        print_report("speculate", None, rows, {}, as_json)
        return
    of_section = {section: [row for row in rows if row["section"] == section] for section in COLUMNS}
    print_report("speculate", None, of_section["cost"], COLUMNS["cost"], as_json)
    for section in ("acceptance", "gain"):
        print_table(of_section[section], COLUMNS[section])
    for note in {row["note"] for row in of_section["gain"] if row["note"]}:
        print(note)
