"""Training a recipe into a run folder: what is checked and made before the first step."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from kmixer.data.tokenizers import Tokenizer
from kmixer.errors import DivergedError, InputError
from kmixer.files import write_json
from kmixer.models.model_folder import TOKENIZER, Model, load_tokenizer, load_weights
from kmixer.runs.placement import Placement
from kmixer.runs.recipe import AnyRecipe
from kmixer.runs.run_folder import DIVERGED, RunFolder
from kmixer.training.averaging import WeightAverage
from kmixer.training.checkpoint import Progress, load_checkpoint, seed_of, seed_step
from kmixer.training.distributed import Processes, check_sharing, open_processes
from kmixer.training.matmul_precision import slower_in_bfloat16
from kmixer.training.norm_matching import WEAK, match_norms, strength_of_first
from kmixer.training.optimizers import build_optimizers
from kmixer.training.origin import Origin, check_same_origin, open_origin
from kmixer.training.process import random_state_kept
from kmixer.training.task import Task
from kmixer.training.tasks import open_task
from kmixer.training.trainer import Reporter, Result, Trainer

# The keys of a recipe that say where its data lies: its sha256 says whether it is the same.
PATHS = ("data.corpus", "data.dataset")


def train(
    recipe: AnyRecipe,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    begin_from: Path | None = None,
    corpus: str | None = None,
    data_dir: Path | None = None,
    cpu: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """Train a recipe into a run folder, or continue the run that is there.

    Random states and settings of torch are afterwards what they were.

    Args:
        recipe: what to train.
        out: the run folder.
        resume: continue the run in it, with this same recipe.
        force: replace the run in it. That run stays until the new one has been evaluated after training began.
        begin_from: a run folder, a model folder or the name of a packaged model, whose weights and tokenizer a new run
            begins with; parameters that are not there begin fresh, and so does the optimiser. Of a run that is
            resumed it must be what it began with.
        corpus: the file, the folder or the name of the data, in the place of the recipe's.
        data_dir: where data is looked for first.
        cpu: stay on the CPU.
        reporter: is told of every step and evaluation.

    Raises:
        InputError: anything wrong with the input; an existing run is then as it was.
        DivergedError: a loss or gradient that is not finite; the last checkpoint is kept.
    """
    processes = open_processes(cpu=cpu, unused_parameters=recipe.leaves_parameters_unused)
    target = RunFolder(out)
    if resume:
        with processes.main_first():
            recipe = _with_data_of(target, recipe, corpus)
            if begin_from is not None:
                check_same_origin(target, begin_from)
    else:
        recipe = recipe if corpus is None else recipe.with_data_at(corpus)
        recipe.check_schedule()
        if processes.is_main:
            target.check_free(force=force)
    processes.wait()
    origin = None if begin_from is None or resume else open_origin(begin_from, recipe)

    with processes.main_first():
        task = open_task(recipe, tokenizer=_tokenizer_of(target, resume, origin), data_dir=data_dir)
    task.check()
    check_sharing(task.recipe, processes.count)

    with random_state_kept(processes.device), target.held() if processes.is_main else contextlib.nullcontext():
        if processes.is_main:
            _check_target(target, task.recipe, resume=resume, force=force)
        return _train(task, target, processes, origin, resume=resume, reporter=reporter or Reporter())


def _with_data_of(target: RunFolder, recipe: AnyRecipe, corpus: str | None) -> AnyRecipe:
    """The recipe that a run is resumed with, its data where it is now: as given, as the recipe says, or the run."""
    there = target.read_recipe()
    if type(there) is not type(recipe):
        target.check_recipe(recipe)
    if corpus is not None:
        return recipe.with_data_at(corpus)
    if recipe.data_path is None or recipe.data_path.exists():
        return recipe
    path = target.recipe_with_data().data_path
    return recipe if path is None else recipe.with_data_at(str(path))


def _tokenizer_of(target: RunFolder, resume: bool, origin: Origin | None) -> Tokenizer | None:
    """The tokenizer that there is already."""
    if origin is not None:
        return origin.tokenizer
    return load_tokenizer(target.path) if resume and (target.path / TOKENIZER).is_file() else None


def _check_target(target: RunFolder, recipe: AnyRecipe, *, resume: bool, force: bool) -> None:
    """Raises InputError where a run cannot be made or resumed there; it is held, so that this stays true."""
    if not resume:
        target.check_free(force=force)  # again: another process may have made a run there while the data was read
        return
    target.check_recipe(recipe, but_for=PATHS)
    target.check_files()


def _train(
    task: Task, target: RunFolder, processes: Processes, origin: Origin | None, *, resume: bool, reporter: Reporter
) -> Result:
    """The training itself, in a folder that no other process trains into."""
    recipe = task.recipe
    dtype = torch.float64 if recipe.training.precision == "float64" else torch.float32
    torch.manual_seed(seed_of(recipe.training.seed, 0, "weights"))
    model = task.build_model()
    fresh = [] if origin is None else origin.put_into(model)
    model = model.to(processes.device, dtype)
    warnings = [] if resume else _warnings(task, model, processes, matched=origin is None)
    optimizers = build_optimizers(model, recipe.training)
    if recipe.training.compile and processes.device.type == "cuda":
        model.compile_layers()

    average = None if recipe.training.average is None else WeightAverage(model, recipe.training.average)

    placement = Placement(target, target)
    progress = Progress(corpus_sha256=task.corpus_sha256)
    if resume:
        progress = load_checkpoint(target, model, optimizers, average)
        if progress.corpus_sha256 != task.corpus_sha256:
            raise InputError(
                f"cannot resume {target.path}: the data is not what it was; --corpus FILE says where that is now"
            )
        load_weights(target.path)  # they may be the best there will be: damage is to be known now
        if processes.is_main:
            target.remove_leftovers()
            target.rewind_metrics(progress.metrics)
            if progress.step < recipe.training.steps:
                target.note_resumption(processes.device, processes.count, progress.step)
    elif processes.is_main:
        placement = Placement.of_new_run(target)
        run = placement.folder
        run.write_recipe(recipe)
        task.save_config(run.path, model)
        about = None if origin is None else {**origin.about, "fresh": fresh, "changed": origin.changed}
        run.write_environment(processes.device, processes.count, task.corpus_sha256, begun_from=about)
    if processes.is_main:
        progress.recipe_sha256 = placement.folder.identity()
    processes.wait()
    if origin is not None and processes.is_main:
        reporter.begun_from(origin.path, fresh, origin.changed)
    for warning in warnings if processes.is_main else ():
        reporter.warned(warning)
    trainer = Trainer(task, placement, model, optimizers, average, progress, processes, reporter)
    try:
        return trainer.run_to_the_end()
    except DivergedError as error:
        if processes.is_main and placement.published:
            write_json(target.path / DIVERGED, {"step": progress.step, "why": str(error)})
        raise


def _warnings(task: Task, model: Model, processes: Processes, *, matched: bool) -> list[str]:
    """What is said once, of a run that begins; its norms begin too."""
    warnings = [_begin_norms(task, model, processes, matched=matched)]
    if task.recipe.training.precision == "bfloat16" and (times := slower_in_bfloat16(processes.device)) is not None:
        warnings.append(
            f"training.precision=bfloat16: matrix products in it take {times:.1f} times as long as in float32 on this "
            "processor, which has no instructions for them; float32 is faster here"
        )
    return [warning for warning in warnings if warning is not None]


def _begin_norms(task: Task, model: Model, processes: Processes, *, matched: bool) -> str | None:
    """Match the norms of a fresh model to the first batch, where the recipe asks for it.

    Every process does it with the whole batch, and so alike. A warning where branches begin weak all the same.
    """
    norm, config = model.config.norm, task.recipe.training
    if not norm.pointwise:
        return None
    task.to(processes.device)
    generator = torch.Generator(processes.device)
    seed_step(generator, config.seed, 1, process=0)
    batch = task.batch(generator)

    def run() -> None:
        task.loss(model, *batch)

    strength = (match_norms if matched and norm.match == "unit" else strength_of_first)(model, run)
    if strength is None or strength >= WEAK:
        return None
    return (
        f"the first norm sees a stream of which alpha makes {strength:.2g}: branches begin at about {strength:.0%} of "
        "what RMSNorm gives them; set model.norm.match=unit or model.embedding_scale=50"
    )
