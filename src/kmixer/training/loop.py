"""The training loop: random windows, one step after another, evaluations and checkpoints in between."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.optim import Optimizer

from kmixer.data.batches import random_windows
from kmixer.data.token_files import Dataset, count_tokens, prepare_dataset
from kmixer.errors import DivergedError, InputError
from kmixer.models.causal_lm import CausalLM
from kmixer.models.heads import AdaptiveHead
from kmixer.models.model_folder import load_tokenizer, load_weights, save_config, save_weights
from kmixer.training.averaging import WeightAverage
from kmixer.training.checkpoint import Progress, load_checkpoint, save_checkpoint, seed_of, seed_step
from kmixer.training.dynamics import first_windows, measure_dynamics, norms_by_group
from kmixer.training.evaluation import Evaluation, evaluate
from kmixer.training.matmul_precision import fast_exact_matmuls
from kmixer.training.optimizers import build_optimizers, learning_rate_factor, set_learning_rates
from kmixer.training.recipe import Recipe
from kmixer.training.results import write_results
from kmixer.training.run_folder import RunFolder


class Reporter:
    """What training tells while it runs. This one keeps silent."""

    def started(self, recipe: Recipe, run: Path, dataset: Dataset, parameters: int, step: int) -> None:
        """Training begins after `step` steps."""

    def trained(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """A step was made."""

    def evaluated(self, step: int, evaluations: list[Evaluation], is_best: bool) -> None:
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


def train(
    recipe: Recipe,
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
    accelerator = Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=_ddp_options(recipe))
    run = RunFolder(out)
    if accelerator.is_main_process:
        if resume:
            run.read_recipe()
        else:
            run.check_free(force=force)
    accelerator.wait_for_everyone()

    with accelerator.main_process_first():
        tokenizer = load_tokenizer(out) if resume else recipe.tokenizer
        dataset = prepare_dataset(recipe.data, tokenizer, data_dir)
    recipe = _with_vocabulary(recipe, dataset.tokenizer.vocabulary_size)
    _check_lengths(recipe, dataset, accelerator.num_processes)

    dtype = torch.float64 if recipe.training.precision == "float64" else torch.float32
    torch.manual_seed(seed_of(recipe.training.seed, 0, "weights"))
    model = CausalLM(recipe.model, recipe.tokenizer.vocabulary_size).to(accelerator.device, dtype)
    if isinstance(model.head, AdaptiveHead):
        model.head.set_frequencies(count_tokens(dataset.train, model.vocabulary_size))
    optimizers = build_optimizers(model, recipe.training)
    if recipe.training.compile and accelerator.device.type == "cuda":
        model.stack.compile_layers()

    average = None if recipe.training.average is None else WeightAverage(model, recipe.training.average)

    place, progress = run, Progress(corpus_sha256=dataset.sha256)
    if resume:
        run.check_recipe(recipe)
        progress = load_checkpoint(run, model, optimizers, average)
        if progress.corpus_sha256 != dataset.sha256:
            raise InputError(f"cannot resume {out}: the text of corpus {recipe.data.corpus} is not what it was")
        load_weights(out)  # they may be the best there will be: damage is to be known now
        if accelerator.is_main_process:
            run.remove_leftovers()
            run.rewind_metrics(progress.metrics)
    else:
        if accelerator.is_main_process:
            run = place.staged()
            run.write_recipe(recipe)
            save_config(run.path, model, dataset.tokenizer)
            run.write_environment(accelerator.device, accelerator.num_processes, dataset.sha256)
    accelerator.wait_for_everyone()
    reporter = reporter or Reporter()
    trainer = _Trainer(recipe, run, place, dataset, model, optimizers, average, progress, accelerator, reporter)
    return trainer.run_to_the_end()


class _Trainer:
    """The parts of a run that every step needs."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        place: RunFolder,
        dataset: Dataset,
        model: CausalLM,
        optimizers: list[Optimizer],
        average: WeightAverage | None,
        progress: Progress,
        accelerator: Accelerator,
        reporter: Reporter,
    ) -> None:
        self.recipe, self.config, self.dataset = recipe, recipe.training, dataset
        self.run, self.place = run, place  # a new run moves to its place with its first checkpoint
        self.model, self.optimizers, self.average, self.progress = model, optimizers, average, progress
        self.accelerator = accelerator
        self.reporter = reporter if accelerator.is_main_process else Reporter()
        self.network: nn.Module = accelerator.prepare_model(model)
        self.tokens = dataset.train.tokens.to(accelerator.device)
        self.generator = torch.Generator(accelerator.device)
        self.norms: dict[str, dict[str, float]] = {}  # of the last step before an evaluation, by group
        self.sample = first_windows(dataset.validation.tokens, recipe.evaluation_window)
        self.training_seconds = 0.0  # of this session, without evaluations
        self.steps_made = 0

    def run_to_the_end(self) -> Result:
        progress, config = self.progress, self.config
        parameters = sum(p.numel() for p in self.model.parameters())
        self.reporter.started(self.recipe, self.place.path, self.dataset, parameters, progress.step)
        with _interrupts() as interrupted, fast_exact_matmuls(self.accelerator.device):
            if progress.best is None:
                self._evaluate()
            while progress.step < config.steps and not self._any(bool(interrupted)):
                self._step()
                if self._is_evaluated(progress.step):
                    self._evaluate()
            if progress.step < config.steps:
                self._checkpoint()
        assert progress.best is not None
        finished = progress.step == config.steps
        if finished and self.accelerator.is_main_process:
            with self._kept_weights():
                write_results(self.run, self.model, self.dataset, recipe=self.recipe, progress=progress)
        self.accelerator.wait_for_everyone()
        return Result(
            self.place.path, progress.step, finished, progress.best, progress.seconds, self.accelerator.is_main_process
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
        rate = self.steps_made * config.batch_size * config.window / self.training_seconds
        if step % config.log_every == 0:
            self._log(factor, float(norm), rate)
        left = (config.steps - step) * self.training_seconds / self.steps_made
        self.reporter.trained(step, mean_loss, rate, left)

    def _backward(self) -> Tensor:
        """Add the gradients of one batch; its mean loss over this process's share."""
        config, accelerator = self.config, self.accelerator
        x, y = random_windows(self.tokens, config.window, config.batch_size, self.generator)
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        pieces = list(zip(x[share].chunk(config.accumulation), y[share].chunk(config.accumulation), strict=True))
        total = torch.zeros((), device=x.device, dtype=torch.float64)
        for index, (inputs, targets) in enumerate(pieces):
            last = index == len(pieces) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.network):
                with torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                    loss = self.network(inputs, targets=targets).losses.mean() / len(pieces)
                loss.backward()
            total += loss.detach()
        return total

    def _log(self, factor: float, norm: float, rate: float) -> None:
        progress, config = self.progress, self.config
        if self.accelerator.is_main_process:
            self.run.append_metrics(
                {
                    "step": progress.step,
                    "tokens": progress.step * config.batch_size * config.window,
                    "train_loss": progress.loss_sum / progress.loss_count,
                    "learning_rate": config.learning_rate * factor,
                    "gradient_norm": norm,
                    "seconds": progress.seconds,
                    "tokens_per_second": rate,
                }
            )
        progress.loss_sum, progress.loss_count = 0.0, 0

    def _kept_weights(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model has the weights that are evaluated and kept: its own, or their average."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def _evaluate(self) -> None:
        """Measure the validation loss by every protocol, keep the best weights, and write a checkpoint."""
        with self._kept_weights():
            evaluations, is_best = self._measure()
        self._checkpoint()
        self.reporter.evaluated(self.progress.step, evaluations, is_best)

    def _measure(self) -> tuple[list[Evaluation], bool]:
        progress, recipe = self.progress, self.recipe
        began = time.perf_counter()
        evaluations = [
            evaluate(self.model, self.dataset.validation, protocol, recipe.evaluation_window)
            for protocol in recipe.evaluation.protocols
        ]
        loss = evaluations[0].loss
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
            measured = [evaluation.to_json() for evaluation in evaluations]
            dynamics = measure_dynamics(self.model, self.sample)
            line = {"step": progress.step, "validation": measured, "dynamics": dynamics, **self.norms}
            self.run.append_metrics({**line, "seconds": progress.seconds})
            if is_best:
                about = {
                    "recipe": recipe.name,
                    "step": progress.step,
                    "validation": measured,
                    "corpus_sha256": progress.corpus_sha256,
                }
                save_weights(self.run.path, self.model, self.dataset.tokenizer, about)
        return evaluations, is_best

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


def _ddp_options(recipe: Recipe) -> list[Any]:
    # A band of the adaptive head that no target of a batch falls into gets no gradient.
    unused = recipe.model.head.kind == "adaptive"
    return [DistributedDataParallelKwargs(find_unused_parameters=unused)]


def _with_vocabulary(recipe: Recipe, size: int) -> Recipe:
    tokenizer = recipe.tokenizer.model_copy(update={"vocabulary_size": size})
    return Recipe.parse(recipe.model_copy(update={"tokenizer": tokenizer}).model_dump(), source=f"recipe {recipe.name}")


def _check_lengths(recipe: Recipe, dataset: Dataset, processes: int) -> None:
    config = recipe.training
    for part, split, window, extra in (
        ("training", dataset.train, config.window, 2),
        ("validation", dataset.validation, recipe.evaluation_window, 1),
        ("test", dataset.test, recipe.evaluation_window, 1),
    ):
        if split is not None and len(split.tokens) < window + extra:
            raise InputError(
                f"the {part} part of corpus {recipe.data.corpus} has {len(split.tokens)} tokens; "
                f"a window of {window} needs {window + extra} or more: give more text or a shorter window"
            )
    if config.batch_size % (config.accumulation * processes):
        raise InputError(
            f"training.batch_size {config.batch_size} cannot be shared evenly by {processes} processes "
            f"with training.accumulation {config.accumulation}"
        )
