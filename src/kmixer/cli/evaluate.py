"""kmixer eval: the loss of a model on held-out text, or on any other."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

from kmixer.analysis.figure_files import check_figure, write_figure
from kmixer.cli.adaptation import Adaptation, named_stretches
from kmixer.cli.options import DataDir, FigureFile, Json, RunOrPackaged, Weights
from kmixer.cli.tasks import Tasks, evaluate_on_tasks
from kmixer.data.documents import held_out_documents
from kmixer.errors import InputError
from kmixer.generation.decoded_losses import decoded_losses
from kmixer.language_model import LanguageModel, load
from kmixer.measure.documents import DocumentsEvaluation, evaluate_documents
from kmixer.measure.evaluation import Evaluation, Reader
from kmixer.measure.evaluation import evaluate as measure
from kmixer.measure.fast_weights import Moves
from kmixer.measure.texts import check_one_text, held_out, read_tokens, window_for
from kmixer.models.model_folder import packaged_models
from kmixer.runs.recipe import ClassificationRecipe, Protocol
from kmixer.runs.run_folder import RunFolder

# A perplexity per word of more digits than this tells nothing: the words are too few, or not words.
LARGEST_PER_WORD = 1e6


def evaluate(
    run: RunOrPackaged,
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Measure on this text instead; - is standard input.")
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="Where the run's own data is now, if it was moved.")] = None,
    protocol: Annotated[
        Literal["windows", "stream"], typer.Option(help="Windows with the state reset, or one stream.")
    ] = "windows",
    window: Annotated[int | None, typer.Option(help="Tokens per window; default: the recipe's, or 1024.")] = None,
    memory: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Another memory for a model that copies; an even number.")
    ] = None,
    adapt: Annotated[
        Literal["on", "off"], typer.Option(help="Off: fast weights learn nothing from what they read.")
    ] = "on",
    reset_every: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Fast weights begin anew after so many tokens.")
    ] = None,
    weights: Weights = "float32",
    documents: Annotated[
        bool, typer.Option("--documents", help="Every document of the validation part alone, from a fresh state.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Tasks of lm-evaluation-harness, in the place of a text.")
    ] = None,
    include: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Of --tasks: more of them, in YAML.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Of --tasks: documents of each.")] = None,
    prefix: Annotated[
        str, typer.Option(metavar="TEXT", help="Of --tasks: one token that documents begin after; default: a line end.")
    ] = "\n",
    unknown: Annotated[
        Literal["error", "drop"], typer.Option(help="Of --tasks: characters that the tokenizer does not know.")
    ] = "error",
    figure: FigureFile = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Measure the loss of a run on the validation part of its data, or of any model on a text, in float32.

    A classifier's accuracy, too; and what lm-evaluation-harness measures on its tasks.

    Example: kmixer eval runs/shakespeare-quick-seed42 --text other.txt
    """
    if window is not None and window < 1:
        raise InputError(f"--window: got {window}; allowed: 1 or more")
    if window is not None and protocol == "stream":
        raise InputError("--window goes with --protocol windows; a stream has none")
    if weights != "float32" and (protocol != "stream" or documents or tasks is not None):
        raise InputError(f"--weights {weights} is of decoding, token after token: add --protocol stream, of one text")
    check_one_text(text, corpus)
    if documents and (text is not None or window is not None):
        raise InputError("--documents takes those of the run's own text, each as a whole: leave --text, --window")
    check_figure(figure)
    adaptation = Adaptation(adapt == "on", reset_every)
    if tasks is not None:
        others = (text, corpus, window, figure)
        if documents or protocol == "stream" or any(given is not None for given in others):
            raise InputError(
                "--tasks have texts and a protocol of their own: leave --text, --corpus, --protocol, "
                "--window, --documents, --figure"
            )
        asked = Tasks([name.strip() for name in tasks.split(",") if name.strip()], include, limit, prefix, unknown)
        evaluate_on_tasks(run, asked, memory, adaptation, as_json)
        return
    if include is not None or limit is not None or prefix != "\n" or unknown != "error":
        raise InputError("--include, --limit, --prefix and --unknown go with --tasks; add it, or leave them out")
    if text is not None:
        model = load(run, memory=memory, weights=weights)
        with adaptation.applied(model) as moves:
            result = _of_text(RunFolder(run), model, text, protocol, window, moves)
        what = text if text != "-" else "standard input"
        _draw(figure, Path(what).name, result, moves)
        _report(what, model, result, adaptation, moves, as_json)
        return
    folder = RunFolder(run)
    if not folder.exists() and str(run) in packaged_models():
        raise InputError(f"{run} has no data beside it; give a text: kmixer eval {run} --text FILE")
    if isinstance(folder.read_recipe(), ClassificationRecipe):
        if memory is not None:
            raise InputError(f"memory: got {memory}; {run} is a classifier and has no copy memory, leave it out")
        if documents or adaptation.asked:
            raise InputError(
                f"{run} is a classifier, without fast weights or documents: leave {adaptation.said(documents)}"
            )
        if figure is not None:
            raise InputError(f"--figure draws losses by position; {run} is a classifier and has none, leave it out")
        _evaluate_classifier(run, corpus, as_json, data_dir)
        return
    model = load(run, memory=memory, weights=weights)
    assert model.tokenizer is not None
    if documents:
        recipe, _ = held_out(folder, model.tokenizer, corpus, data_dir)
        with adaptation.applied(model):
            of_documents = evaluate_documents(model, held_out_documents(recipe.data, model.tokenizer, data_dir))
        _draw(figure, f"{recipe.data.corpus}, validation part, documents", of_documents, None)
        _report_documents(recipe.data.corpus, model, of_documents, adaptation, as_json)
        return
    recipe, split = held_out(folder, model.tokenizer, corpus, data_dir)
    with adaptation.applied(model) as moves:
        result = measure(model, split, protocol, window or recipe.evaluation_window, moves, _reader(model))
    what = f"{recipe.data.corpus}, validation part"
    _draw(figure, what, result, moves)
    _report(what, model, result, adaptation, moves, as_json)


def _draw(figure: Path | None, what: str, result: Evaluation | DocumentsEvaluation, moves: Moves | None) -> None:
    """Write the figure that was asked for."""
    if figure is None:
        return
    from kmixer.analysis.evaluation import draw_positions, draw_stream

    if isinstance(result, DocumentsEvaluation):
        drawn = draw_positions(what, result.stretches, max(result.lengths))
    elif result.stretches is not None and result.window is not None:
        drawn = draw_positions(what, result.stretches, result.window)
    elif result.tenths is not None:
        drawn = draw_stream(what, result.tenths, result.tokens, moves)
    else:
        raise InputError(f"--figure: got a stream of {result.tokens} tokens; allowed: 10 or more, which have tenths")
    write_figure(drawn, figure)


def _of_text(
    run: RunFolder, model: LanguageModel, source: str, protocol: Protocol, window: int | None, moves: Moves | None
) -> Evaluation:
    assert model.tokenizer is not None
    split = read_tokens(source, model.tokenizer)
    return measure(model, split, protocol, window or window_for(run, model, split), moves, _reader(model))


def _reader(model: LanguageModel) -> Reader | None:
    """What reads a stream: a decoder where its matrices are rounded, else the model itself."""
    return None if model.decoded_in == "float32" else decoded_losses


def _report(
    what: str, model: LanguageModel, result: Evaluation, adaptation: Adaptation, moves: Moves | None, as_json: bool
) -> None:
    copying = model.config.copy_memory
    if as_json:
        along = {"moves": moves.to_json()} if moves is not None and moves.points else {}
        memory = {} if copying is None else {"memory": copying.memory}
        rounded = {} if model.decoded_in == "float32" else {"weights": model.decoded_in}
        print(json.dumps(result.to_json() | memory | rounded | adaptation.to_json(model) | along))
        return
    assert model.tokenizer is not None
    if model.decoded_in != "float32":
        what += f", decoded with matrices in {model.decoded_in}"
    where = f"windows of {result.window}, state reset" if result.window else "one stream, state carried"
    if copying is not None:
        where += f", copy memory of {'all' if copying.memory is None else f'{copying.memory:,}'} tokens"
    print(f"{what}, {result.tokens:,} tokens, {where}{adaptation.words(model)}")
    print(f"cross-entropy       {result.loss:.4f} nats per token")
    if result.perplexity is not None:
        print(f"perplexity          {result.perplexity:.4f} per token ({model.tokenizer.to_json()['kind']})")
    if result.bits_per_character is not None:
        print(f"bits per character  {result.bits_per_character:.4f}")
    print(f"bits per byte       {result.bits_per_byte:.4f}")
    print(f"perplexity per word {per_word(result.perplexity_per_word)}")
    if moves is not None and moves.points:
        print("moved, |F| / |W|    " + _listed(zip(moves.layers, moves.points[-1][1], strict=True), 3))
    if result.stretches is not None and result.window is not None and adaptation.matters(model):
        print("by position         " + _listed(named_stretches(result.stretches, result.window)))
    if result.tenths is not None and adaptation.matters(model):
        print("by tenth            " + "  ".join(f"{loss:.4f}" for loss in result.tenths))


def _report_documents(
    what: str, model: LanguageModel, result: DocumentsEvaluation, adaptation: Adaptation, as_json: bool
) -> None:
    if as_json:
        print(json.dumps(result.to_json() | adaptation.to_json(model)))
        return
    short = f" ({result.too_short:,} too short)" if result.too_short else ""
    alone = f"{result.documents:,} documents{short}, each from a fresh state"
    print(f"{what}, validation part, {result.tokens:,} tokens, {alone}{adaptation.words(model)}")
    print(f"cross-entropy       {result.loss:.4f} nats per token")
    print("by third            " + _listed(zip(("first", "middle", "last"), result.thirds, strict=True)))
    print("by position         " + _listed(named_stretches(result.stretches, max(result.lengths))))


def _listed(pairs: Iterable[tuple[str, float]], digits: int = 4) -> str:
    return "  ".join(f"{name}: {value:.{digits}f}" for name, value in pairs)


def per_word(perplexity: float | None) -> str:
    """A perplexity per word in four digits, or why it is left out."""
    if perplexity is None or perplexity >= LARGEST_PER_WORD:
        return "left out: over a million, so the text has few blanks or the model does not know its words"
    return f"{float(f'{perplexity:.4g}'):,.10g}"


def _evaluate_classifier(run: Path, data: str | None, as_json: bool, data_dir: Path | None) -> None:
    from kmixer.training.tasks import open_classifier

    task, model = open_classifier(run, data_dir, data)
    (result,) = task.evaluate(model)
    if as_json:
        print(json.dumps(result.to_json()))
        return
    print(f"{task.recipe.dataset}, validation part, {result.examples:,} examples")
    print(f"cross-entropy       {result.loss:.4f} nats")
    print(f"accuracy            {result.accuracy:.4f}")
