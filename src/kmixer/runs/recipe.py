"""Recipes: one TOML file says everything about an experiment."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import Field, model_validator

from kmixer.config import Positive, StrictConfig, is_text
from kmixer.data.config import DataConfig, ImageDataConfig, SequenceDataConfig, TokenizerConfig
from kmixer.data.corpora import CORPORA
from kmixer.errors import SHOWN_CHARACTERS, InputError, one_line, shown, shown_name
from kmixer.files import TOML_BYTES, expand_user, parse_toml, read_text, toml_values
from kmixer.models.causal_lm import LanguageModelConfig
from kmixer.models.sequence_classifier import SequenceClassifierConfig
from kmixer.models.vision import VisionConfig

Protocol = Literal["windows", "stream"]
NonNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizationConfig(StrictConfig):
    """How the weights are found."""

    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 42
    steps: Positive
    batch_size: Positive  # windows or examples per step, over all processes and accumulation steps
    optimizer: Literal["grouped", "simple", "muon"]  # see kmixer.training.optimizers
    learning_rate: Annotated[float, Field(gt=0)]  # of AdamW
    muon_learning_rate: Annotated[float, Field(gt=0)] | None = None  # of the matrices, optimizer "muon"
    learning_rate_floor: NonNegative  # where the cosine ends; in proportion for every group
    warmup_steps: Annotated[int, Field(ge=0, lt=1 << 31)]
    weight_decay: NonNegative = 0.02
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.8, 0.999)
    clip: Annotated[float, Field(gt=0)] = 1.0  # of the norm of all gradients
    precision: Literal["float32", "bfloat16", "float64"] = "float32"  # bfloat16: autocast, weights in float32
    # Evaluate and keep an exponential moving average of the weights with this decay, instead of the weights.
    average: Annotated[float, Field(gt=0, lt=1)] | None = None
    compile: bool = False  # torch.compile of every layer on a GPU; on a CPU its own compiled kernels are faster
    accumulation: Positive = 1  # forward and backward passes per step
    evaluate_every: Positive = 250  # steps between evaluations, each with a checkpoint
    log_every: Positive = 10  # steps between lines of training loss

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.optimizer == "muon") != (self.muon_learning_rate is not None):
            raise ValueError(
                f"optimizer {self.optimizer!r} with muon_learning_rate {self.muon_learning_rate}; "
                "it goes with optimizer 'muon' and only with it"
            )
        if self.learning_rate_floor > self.learning_rate:
            raise ValueError(
                f"learning_rate_floor {self.learning_rate_floor} is above learning_rate {self.learning_rate}"
            )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into accumulation = {self.accumulation} equal parts"
            )
        return self


class TrainingConfig(OptimizationConfig):
    """How the weights of a language model are found."""

    window: Positive  # tokens per window


class EvaluationConfig(StrictConfig):
    """How validation loss is measured during training; the first protocol chooses the best checkpoint."""

    protocols: Annotated[tuple[Protocol, ...], Field(min_length=1, strict=False)] = ("windows",)
    window: Positive | None = None  # of protocol "windows"; None is the training window
    test: bool = True  # measure the test part, where there is one, when training ends; not while choosing a recipe


class AnyRecipe(StrictConfig):
    """An experiment: what every kind of it says of itself."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    description: str
    training: OptimizationConfig

    def measures(self) -> dict[str, Any]:
        """What two runs must share for their losses to measure the same thing."""
        raise NotImplementedError

    @property
    def units_per_step(self) -> int:
        """Tokens or examples of a training step."""
        return self.training.batch_size

    @property
    def leaves_parameters_unused(self) -> bool:
        """Whether a step may leave parameters without a gradient."""
        return False

    @property
    def data_path(self) -> Path | None:
        """The file or folder that the data is read from; None for data known by a name."""
        return None

    def with_data_at(self, path: str) -> Self:
        """The same recipe, its data read from there. Raises InputError where it is not read from a file."""
        raise InputError(f"recipe {self.name} generates its data or finds it by name: no file can take its place")

    def with_whole_path(self) -> Self:
        """The same recipe in any working folder: the path of its data begins at the root."""
        path = self.data_path
        return self if path is None or path.is_absolute() else self.with_data_at(str(path.resolve()))

    def check_schedule(self) -> None:
        """Raises InputError for a warm-up that training does not see the end of. Runs made before are still read."""
        config = self.training
        if config.warmup_steps > config.steps:
            raise InputError(
                f"training.warmup_steps {config.warmup_steps} is longer than training.steps {config.steps}: the "
                f"learning rate would never be reached; lower training.warmup_steps to {config.steps} or less"
            )

    def by_key(self) -> dict[str, Any]:
        """Every value by its whole key, `training.steps`; None where a key has no value."""
        return _flat(self.model_dump())

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(exclude_none=True))


class LanguageRecipe(AnyRecipe):
    """A language model: data, tokenizer, model, training, evaluation."""

    task: Literal["language"] = "language"
    data: DataConfig
    tokenizer: TokenizerConfig
    model: LanguageModelConfig
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        limit, limited_by = self.model.max_positions, self.model.limited_by
        for key, window in (("training.window", self.training.window), ("evaluation.window", self.evaluation.window)):
            if limit is not None and window is not None and window > limit:
                raise ValueError(f"{key}: got {window}; {limited_by} has model.base_kernel.size {limit}")
        if limit is not None and "stream" in self.evaluation.protocols:
            raise ValueError(
                f"evaluation.protocols: 'stream' needs a model that streams; {limited_by} "
                "does not (toeplitz, conv and none do)"
            )
        v = self.tokenizer.vocabulary_size
        if self.model.head.kind == "adaptive" and self.model.head.cutoffs is None and v < 1024:
            raise ValueError(f"model.head.kind: 'adaptive' needs tokenizer.vocabulary_size >= 1024, got {v}")
        return self

    @property
    def data_path(self) -> Path | None:
        return None if self.data.corpus in CORPORA else expand_user(Path(self.data.corpus))

    def with_data_at(self, path: str) -> Self:
        return self.model_copy(update={"data": self.data.model_copy(update={"corpus": path})})

    @property
    def evaluation_window(self) -> int:
        return self.evaluation.window or self.training.window

    @property
    def units_per_step(self) -> int:
        return self.training.batch_size * self.training.window

    @property
    def leaves_parameters_unused(self) -> bool:
        fast = self.model.fast_weights
        return (
            self.model.head.kind == "adaptive"  # a band that no target of a batch falls into
            or (fast is not None and self.training.window <= fast.chunk)  # nothing that is written is read
        )

    def measures(self) -> dict[str, Any]:
        return {
            "validation": self.data.validation,
            "test": self.data.test,
            "tokenizer": self.tokenizer.model_dump(),
            "protocol": self.evaluation.protocols[0],
            "window": self.evaluation_window,
        }


class ClassificationRecipe(AnyRecipe):
    """A classifier: data, model, training."""

    data: ImageDataConfig | SequenceDataConfig
    model: VisionConfig | SequenceClassifierConfig

    @property
    def dataset(self) -> str:
        return self.data.dataset

    def measures(self) -> dict[str, Any]:
        return {"data": self.data.model_dump(exclude={"augment"}), "protocol": "examples"}


class ImageRecipe(ClassificationRecipe):
    """A classifier of images."""

    task: Literal["image-classification"]
    data: ImageDataConfig
    model: VisionConfig

    @property
    def data_path(self) -> Path | None:
        path = Path(self.data.dataset)
        return path if path.suffix == ".npz" else None

    def with_data_at(self, path: str) -> Self:
        return self.model_copy(update={"data": self.data.model_copy(update={"dataset": path})})


class SequenceRecipe(ClassificationRecipe):
    """A classifier of token sequences."""

    task: Literal["sequence-classification"]
    data: SequenceDataConfig
    model: SequenceClassifierConfig

    def measures(self) -> dict[str, Any]:
        return super().measures() | {"causal": self.model.causal}


RECIPES: dict[str, type[AnyRecipe]] = {
    "language": LanguageRecipe,
    "image-classification": ImageRecipe,
    "sequence-classification": SequenceRecipe,
}


def packaged_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    folder = resources.files("kmixer") / "recipes"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def read_recipe_file(recipe: str) -> str:
    """The text of a packaged recipe or of a TOML file."""
    if recipe in packaged_recipes():
        return (resources.files("kmixer") / "recipes" / f"{recipe}.toml").read_text(encoding="utf-8")
    if Path(recipe).suffix == ".toml":
        return read_text(Path(recipe), TOML_BYTES)
    raise InputError(
        f"recipe {shown(recipe)}: no such recipe; allowed: {', '.join(packaged_recipes())}, or a .toml file"
    )


def load_recipe(recipe: str, settings: list[str] | None = None) -> AnyRecipe:
    """A recipe by name or file, with `key=value` settings applied. Raises InputError, one line."""
    text = read_recipe_file(recipe)
    values = parse_toml(text, f"recipe {recipe}")
    for setting in settings or []:
        _apply(values, setting, _kind_of(values, f"recipe {recipe}"))
    return parse_recipe(values, f"recipe {recipe}")


def load_language_recipe(recipe: str, settings: list[str] | None = None) -> LanguageRecipe:
    """`load_recipe` for what needs a language model. Raises InputError for a recipe of another task."""
    return as_language(load_recipe(recipe, settings))


def as_language(recipe: AnyRecipe) -> LanguageRecipe:
    """The same recipe. Raises InputError where it is not of a language model."""
    if not isinstance(recipe, LanguageRecipe):
        raise InputError(f"recipe {recipe.name} is no language model; this command needs one")
    return recipe


def parse_recipe(values: dict[str, Any], source: str) -> AnyRecipe:
    """A recipe from nested plain values; `source` says where they are from."""
    return _kind_of(values, source).parse(values, source=source)


def _kind_of(values: dict[str, Any], source: str) -> type[AnyRecipe]:
    task = values.get("task", "language")
    if not isinstance(task, str) or task not in RECIPES:
        raise InputError(f"{source}: task: got {shown(task)}; allowed: {', '.join(RECIPES)}")
    return RECIPES[task]


def _apply(values: dict[str, Any], setting: str, kind: type[AnyRecipe]) -> None:
    key, equals, text = setting.partition("=")
    source = f"--set {one_line(setting, SHOWN_CHARACTERS)}"
    if not equals:
        raise InputError(f"{source}: got no value; write it as key=value, for example training.steps=100")
    *parents, last = keys = key.strip().split(".")
    for parent in parents:
        if not text.strip() and parent not in values:
            return  # nothing is set there: the default holds
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise InputError(f"{source}: {shown_name(parent)} is a value, not a group of keys")
    if not text.strip():  # back to the key's default
        values.pop(last, None)
    else:
        values[last] = _parse_value(text.strip(), source, is_text=is_text(kind, keys))


def _parse_value(text: str, source: str, *, is_text: bool) -> Any:
    """A TOML value; what is none is a string, and so is 1984 or 2024-01-01 where the key is a text: no quotes needed.

    Raises InputError for a text that sets more than one value.
    """
    try:
        values = toml_values(f"value = {text}", source)
    except tomllib.TOMLDecodeError:
        return text
    if values.keys() != {"value"}:
        raise InputError(f"{source}: it sets more than one key; give --set once for each")
    value = values["value"]
    return text if is_text and not isinstance(value, str) else value


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
