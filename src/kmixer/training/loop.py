"""The training loop: one step after another, evaluations and checkpoints in between, whatever the task."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.optim import Optimizer

from kmixer.errors import DivergedError, InputError
from kmixer.files import write_json
from kmixer.models.model_folder import Model, load_weights
from kmixer.runs.recipe import AnyRecipe, ClassificationRecipe, Recipe
from kmixer.runs.run_folder import DIVERGED, RunFolder
from kmixer.training.averaging import WeightAverage
from kmixer.training.checkpoint import Progress, load_checkpoint, save_checkpoint, seed_of, seed_step
from kmixer.training.classification import open_classification
from kmixer.training.language import LanguageTask
from kmixer.training.matmul_precision import fast_exact_matmuls
from kmixer.training.optimizers import build_optimizers, learning_rate_factor, norms_by_group, set_learning_rates
from kmixer.training.results import write_results
from kmixer.training.task import Measured, Task


class Reporter:
    """What training tells while it runs. This one keeps silent."""

    def started(self, task: Task, run: Path, parameters: int, step: int) -> None:
        """Training begins after `step` steps."""

    def trained(self, step: int, loss: float, units_per_second: float, seconds_left: float) -> None:
        """A step was made."""

    def evaluated(self, step: int, measured: Sequence[Measured], is_best: bool) -> None:
        """The validation part was evaluated."""


@dataclass(frozen=True)
class Result:
    """How training ended."""

    run: Path
    step: int
    finished: bool  # False: interrupted, and saved
    best: dict[str, Any]  # {"step", "loss"} on the validation part, by the first protocol
    seconds: float
    is_main_process: bool = True


def open_task(recipe: AnyRecipe, *, resumed: Path | None = None, data_dir: Path | None = None) -> Task:
    """A recipe with its data; `resumed` is the run it continues. Raises InputError where the data is not there."""
    if isinstance(recipe, ClassificationRecipe):
        return open_classification(recipe, data_dir)
    assert isinstance(recipe, Recipe)
    return LanguageTask(recipe, resumed, data_dir)


def train(
    recipe: AnyRecipe,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    data_dir: Path | None = None,
    cpu: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """Train a recipe into a run folder, or continue the run that is there.

    Raises:
        InputError: anything wrong with the input; an existing run is then as it was.
        DivergedError: a loss or gradient that is not finite; the last checkpoint is kept.
    """
    options = DistributedDataParallelKwargs(find_unused_parameters=recipe.leaves_parameters_unused)
    accelerator = Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=[options])
    run = RunFolder(out)
    if accelerator.is_main_process:
        if resume:
            run.read_recipe()
        else:
            run.check_free(force=force)
    accelerator.wait_for_everyone()

    with accelerator.main_process_first():
        task = open_task(recipe, resumed=out if resume else None, data_dir=data_dir)
    recipe = task.recipe
    task.check()
    _check_sharing(recipe, accelerator.num_processes)

    with run.held() if accelerator.is_main_process else contextlib.nullcontext():
        return _train(task, run, accelerator, resume=resume, reporter=reporter or Reporter())


def _train(task: Task, place: RunFolder, accelerator: Accelerator, *, resume: bool, reporter: Reporter) -> Result:
    """The training itself, in a folder that no other process trains into."""
    recipe = task.recipe
    dtype = torch.float64 if recipe.training.precision == "float64" else torch.float32
    torch.manual_seed(seed_of(recipe.training.seed, 0, "weights"))
    model = task.build_model().to(accelerator.device, dtype)
    optimizers = build_optimizers(model, recipe.training)
    if recipe.training.compile and accelerator.device.type == "cuda":
        model.compile_layers()

    average = None if recipe.training.average is None else WeightAverage(model, recipe.training.average)

    run, progress = place, Progress(corpus_sha256=task.corpus_sha256)
    if resume:
        run.check_recipe(recipe)
        progress = load_checkpoint(run, model, optimizers, average)
        if progress.corpus_sha256 != task.corpus_sha256:
            raise InputError(f"cannot resume {place.path}: the data is not what it was")
        load_weights(place.path)  # they may be the best there will be: damage is to be known now
        if accelerator.is_main_process:
            run.remove_leftovers()
            run.rewind_metrics(progress.metrics)
            if progress.step < recipe.training.steps:
                run.note_resumption(accelerator.device, accelerator.num_processes, progress.step)
    else:
        if accelerator.is_main_process:
            run = place.staged()
            run.write_recipe(recipe)
            task.save_config(run.path, model)
            run.write_environment(accelerator.device, accelerator.num_processes, task.corpus_sha256)
    accelerator.wait_for_everyone()
    trainer = _Trainer(task, run, place, model, optimizers, average, progress, accelerator, reporter)
    try:
        return trainer.run_to_the_end()
    except DivergedError as error:
        if accelerator.is_main_process and trainer.run is place:
            write_json(place.path / DIVERGED, {"step": progress.step, "why": str(error)})
        elif accelerator.is_main_process:  # it never came to its place, where an older run may be
            shutil.rmtree(trainer.run.path, ignore_errors=True)
        raise


class _Trainer:
    """The parts of a run that every step needs."""

    def __init__(
        self,
        task: Task,
        run: RunFolder,
        place: RunFolder,
        model: Model,
        optimizers: list[Optimizer],
        average: WeightAverage | None,
        progress: Progress,
        accelerator: Accelerator,
        reporter: Reporter,
    ) -> None:
        self.task, self.config = task, task.recipe.training
        self.run, self.place = run, place  # a new run moves to its place with its first checkpoint
        self.model, self.optimizers, self.average, self.progress = model, optimizers, average, progress
        self.accelerator = accelerator
        self.reporter = reporter if accelerator.is_main_process else Reporter()
        self.network: nn.Module = accelerator.prepare_model(model)
        task.to(accelerator.device)
        self.generator = torch.Generator(accelerator.device)
        self.norms: dict[str, dict[str, float]] = {}  # of the last step before an evaluation, by group
        self.training_seconds = 0.0  # of this session, without evaluations
        self.steps_made = 0

    def run_to_the_end(self) -> Result:
        progress, config = self.progress, self.config
        parameters = sum(p.numel() for p in self.model.parameters())
        self.reporter.started(self.task, self.place.path, parameters, progress.step)
        with _interrupts() as interrupted, fast_exact_matmuls(self.accelerator.device):
            if progress.best is None:
                self._evaluate()
            while progress.step < config.steps and not self._any(bool(interrupted)):
                self._step()
                if self._is_evaluated(progress.step):
                    self._evaluate()
            if progress.step < config.steps:
                self._check_weights()
                self._checkpoint()
        assert progress.best is not None
        finished = progress.step == config.steps
        if finished and self.accelerator.is_main_process:
            with self._kept_weights():
                write_results(self.run, self.model, self.task, progress)
        self.accelerator.wait_for_everyone()
        return Result(
            self.place.path, progress.step, finished, progress.best, progress.seconds, self.accelerator.is_main_process
        )

    def _check_weights(self) -> None:
        """Raises DivergedError where the last step, which no evaluation has seen, made weights that are not finite."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise DivergedError(
                f"step {self.progress.step}: weights are not finite; training stopped. "
                f"{self.place.path} keeps the best weights and the last good checkpoint"
            )

    def _is_evaluated(self, step: int) -> bool:
        return step % self.config.evaluate_every == 0 or step == self.config.steps

    def _step(self) -> None:
        config, progress = self.config, self.progress
        began = time.perf_counter()
        step = progress.step + 1
        factor = learning_rate_factor(step, config)
        set_learning_rates(self.optimizers, factor)
        seed_step(self.generator, config.seed, step, self.accelerator.process_index)
        loss = self._backward()
        recorded = self._is_evaluated(step)
        if recorded:
            self.norms["gradient_norms"] = norms_by_group(self.model, lambda _, parameter: parameter.grad)
            before = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        mean_loss = float(self.accelerator.reduce(loss, reduction="mean"))
        if not (math.isfinite(mean_loss) and bool(torch.isfinite(norm))):
            raise DivergedError(
                f"step {step}: loss {mean_loss}, gradient norm {float(norm)}; training stopped. "
                f"{self.place.path} keeps the best weights and the last good checkpoint; "
                "try a lower training.learning_rate or a longer training.warmup_steps"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if recorded:
            self.norms["update_norms"] = norms_by_group(self.model, lambda name, parameter: parameter - before[name])

        if self.average is not None:
            self.average.update(step)

        progress.step = step
        progress.loss_sum += mean_loss
        progress.loss_count += 1
        self.steps_made += 1
        spent = time.perf_counter() - began
        self.training_seconds += spent
        progress.seconds += spent
        rate = self.steps_made * self.task.recipe.units_per_step / self.training_seconds
        if step % config.log_every == 0:
            self._log(factor, float(norm), rate)
        left = (config.steps - step) * self.training_seconds / self.steps_made
        self.reporter.trained(step, mean_loss, rate, left)

    def _backward(self) -> Tensor:
        """Add the gradients of one batch; its mean loss over this process's share."""
        config, accelerator = self.config, self.accelerator
        x, y = self.task.batch(self.generator)
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        pieces = list(zip(x[share].chunk(config.accumulation), y[share].chunk(config.accumulation), strict=True))
        total = torch.zeros((), device=x.device, dtype=torch.float64)
        for index, (inputs, targets) in enumerate(pieces):
            last = index == len(pieces) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.network):
                with torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                    loss = self.task.loss(self.network, inputs, targets) / len(pieces)
                loss.backward()
            total += loss.detach()
        return total

    def _log(self, factor: float, norm: float, rate: float) -> None:
        progress, config = self.progress, self.config
        if self.accelerator.is_main_process:
            self.run.append_metrics(
                {
                    "step": progress.step,
                    self.task.unit: progress.step * self.task.recipe.units_per_step,
                    "train_loss": progress.loss_sum / progress.loss_count,
                    "learning_rate": config.learning_rate * factor,
                    "gradient_norm": norm,
                    "seconds": progress.seconds,
                    f"{self.task.unit}_per_second": rate,
                }
            )
        progress.loss_sum, progress.loss_count = 0.0, 0

    def _kept_weights(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model has the weights that are evaluated and kept: its own, or their average."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def _evaluate(self) -> None:
        """Measure the validation loss by every protocol, keep the best weights, and write a checkpoint."""
        with self._kept_weights():
            measured, is_best = self._measure()
        self._checkpoint()
        self.reporter.evaluated(self.progress.step, measured, is_best)

    def _measure(self) -> tuple[Sequence[Measured], bool]:
        progress = self.progress
        began = time.perf_counter()
        measured = self.task.evaluate(self.model)
        loss = measured[0].loss
        if not math.isfinite(loss):
            raise DivergedError(
                f"step {progress.step}: validation loss {loss}; training stopped. "
                + (f"{self.place.path} keeps the best weights and the last good checkpoint" if progress.best else "")
            )
        is_best = progress.best is None or loss < progress.best["loss"]
        if is_best:
            progress.best = {"step": progress.step, "loss": loss}
        progress.seconds += time.perf_counter() - began
        if self.accelerator.is_main_process:
            found = [each.to_json() for each in measured]
            dynamics = self.task.dynamics(self.model)
            line = {"step": progress.step, "validation": found, "dynamics": dynamics, **self.norms}
            self.run.append_metrics({**line, "seconds": progress.seconds})
            if is_best:
                about = {
                    "recipe": self.task.recipe.name,
                    "step": progress.step,
                    "validation": found,
                    "corpus_sha256": progress.corpus_sha256,
                }
                self.task.save_weights(self.run.path, self.model, about)
        return measured, is_best

    def _checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(self.run, self.model, self.optimizers, self.progress, self.average)
            if self.run is not self.place:
                self.run.publish(self.place)
                self.run = self.place

    def _any(self, flag: bool) -> bool:
        """Whether the flag is set in any process: all of them leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0)


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that fills when the process is asked to stop (Ctrl-C, SIGTERM); a second Ctrl-C stops at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check_sharing(recipe: AnyRecipe, processes: int) -> None:
    config = recipe.training
    if config.batch_size % (config.accumulation * processes):
        raise InputError(
            f"training.batch_size {config.batch_size} cannot be shared evenly by {processes} processes "
            f"with training.accumulation {config.accumulation}"
        )
