"""What every test shares: checked shape annotations, poisoned memory, a private cache folder, small inputs."""

from __future__ import annotations

import os
import pydoc_data.topics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

# Threads that wait give up their core to other test processes. OpenMP reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Shape annotations are checked in the test run only; the hook must come before the first import of kmixer.
# Out stay kmixer.ops.decay.kernels and kmixer.ops.attention.softmax: Triton and FlexAttention read the functions they
# are given, and cannot see through a wrapper.
CHECKED = (
    "kmixer.ops.attention.native",
    "kmixer.ops.base_kernel",
    "kmixer.ops.cross_entropy",
    "kmixer.ops.decay.recurrence",
    "kmixer.ops.decay.launch",
    "kmixer.ops.feed_forward",
    "kmixer.ops.fused",
    "kmixer.ops.attention.gaussian",
    "kmixer.ops.attention.sinkhorn",
    "kmixer.ops.attention.sinkhorn_converged",
    "kmixer.ops.attention.sinkhorn_steps",
    "kmixer.ops.attention.hierarchical",
    "kmixer.ops.linear",
    "kmixer.ops.suffix_automaton",
    "kmixer.layers",
    "kmixer.models.causal_lm",
    "kmixer.models.k_stack",
    "kmixer.models.transformer",
    "kmixer.models.vision",
    "kmixer.generation.prepared",
    "kmixer.generation.acceptance",
    "kmixer.generation.rules",
    "kmixer.generation.sampling",
    "kmixer.generation.tally",
    "kmixer.interop.exported_step",
    "kmixer.data.batches",
    "kmixer.data.images",
    "kmixer.training.muon",
    "kmixer.trail",
)
HOOK = jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# Without a GPU the Triton kernels run in its interpreter. Triton decides that when it is first imported,
# which torch may do before a test does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("kmixer", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("kmixer")
torch.set_num_threads(2)


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """As many threads inside, and as many as before afterwards, whatever was set in between."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty is full of NaN, so that a result which reads uninitialised memory fails its test."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def settings_of_the_process() -> Iterator[None]:
    """What a command sets for its whole process ends with the test that called it."""
    with threads_of_torch(torch.get_num_threads()):
        yield
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache folder."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache / "kmixer"


@pytest.fixture(scope="session")
def text() -> str:
    """20,000 characters of real text that every Python carries."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[key] for key in sorted(topics))[:20_000]


@pytest.fixture
def text_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def shared_data() -> Path:
    """Folder of real corpora for the tests that use them; they skip where it is not given."""
    folder = os.environ.get("KMIXER_TEST_DATA")
    if folder is None:
        pytest.skip("KMIXER_TEST_DATA does not name a folder with the corpora")
    return Path(folder)


def tiny_recipe_values(corpus: Path | str) -> dict[str, Any]:
    """A recipe that trains in about a second."""
    return {
        "name": "tiny",
        "description": "for tests",
        "data": {"corpus": str(corpus), "validation": 0.1},
        "tokenizer": {"kind": "char", "vocabulary_size": 90},
        "model": {"width": 16, "layers": 2, "rank": 2, "dropout": {"embedding": 0.1, "mlp": 0.1, "residual": 0.1}},
        "training": {
            "steps": 8,
            "batch_size": 4,
            "window": 32,
            "optimizer": "muon",
            "learning_rate": 0.01,
            "muon_learning_rate": 0.02,
            "learning_rate_floor": 0.001,
            "warmup_steps": 2,
            "evaluate_every": 3,
            "log_every": 2,
        },
    }
