"""Every command and every block of code in README and docs runs, page by page, from top to bottom.

Trainings are small (see `small`): the words of a command are the page's, what its recipe asks for is bounded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from kmixer.cli.main import app
from kmixer.experiments.sweep import packaged_ablations
from kmixer.runs.recipe import packaged_recipes
from tests.cli.conftest import Run, kmixer_command  # noqa: F401  (a fixture)
from tests.documents import small

ROOT = Path(__file__).parents[2]
# docs/adding-a-mixer.md is a worked example: tests/documents/test_adding_a_mixer.py runs it.
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - {ROOT / "docs/adding-a-mixer.md"})
# What .ci/run itself does on a clean clone.
SETTING_UP = ("make demo", "make test", "make lint", "pip install .")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`(kmixer [^`]+)`")
README_WORDS = 900
# Libraries that a command needs and that not every environment has: it is run where they are.
NEEDED = {"--tasks": "lm_eval", "trackio": "trackio", "wandb": "wandb"}


def named(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks of a page."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def command_lines(content: str) -> list[str]:
    """The commands of a block, without what stands behind a #."""
    lines = content.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if line]


@pytest.fixture
def page_folder(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page's commands run: the files that a reader has, and small recipes in every process."""
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    for name in ("server.log", "today.log", "other.txt"):
        (tmp_path / name).write_text(text[:3000], encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/my.txt").write_text(text, encoding="utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(small.SITE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(small.recipes, "parse_recipe", small.recipes.parse_recipe)  # put back afterwards
    small.shrink()
    return tmp_path


@named([page for page in PAGES if blocks(page)])
def test_a_page_runs(page: Path, page_folder: Path, kmixer_command: Run) -> None:  # noqa: F811
    names: dict[str, object] = {}
    with contextlib.ExitStack() as servers:
        for language, content in blocks(page):
            if language == "python":
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(content, str(page), "exec"), names)
            elif language in ("", "sh"):
                for line in command_lines(content):
                    if line.endswith("&"):
                        servers.enter_context(in_the_background(line))
                    else:
                        run_line(line, kmixer_command)
            else:
                assert language in ("toml", "json", "text", "yaml"), (
                    f"{page.name}: a block of {language}, which nothing runs"
                )


def run_line(line: str, kmixer: Run) -> None:
    """One command of a page, its output into a file where the page says so."""
    if line in SETTING_UP:
        target = line.removeprefix("make ")
        assert target == line or f"\n{target}:" in (ROOT / "Makefile").read_text()
        return
    if any(word in line and importlib.util.find_spec(library) is None for word, library in NEEDED.items()):
        return
    words = shlex.split(line)
    if "|" in words or "<" in words:
        run_in_a_shell(line)
        return
    out = None
    if ">" in words:
        *words, _, out = words
    if words[0] == "kmixer":
        answer = kmixer(*words[1:])
        assert answer.code == 0, f"{line}: {answer}"
        printed = answer.out
    else:
        assert words[0] == "python", f"nothing runs {line}"
        ended = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=False)
        assert ended.returncode == 0, f"{line}: {ended.stderr}"
        printed = ended.stdout
    if out is not None:
        Path(out).write_text(printed, encoding="utf-8")


@contextlib.contextmanager
def in_the_background(line: str) -> Iterator[None]:
    """A server, from when it says its address to the end of the page, when SIGTERM ends it."""
    words = shlex.split(line.removesuffix("&"))
    assert words[0] == "kmixer", f"nothing runs {line}"
    with subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert "http://" in server.stdout.readline(), line
            yield
            server.terminate()
            assert server.wait(30) == 0, line
        finally:
            server.kill()


def run_in_a_shell(line: str) -> None:
    """A command that reads another's output; of a file that grows, what there is."""
    program = line.replace("tail -f", "cat").replace("kmixer", f"{shlex.quote(sys.executable)} -m kmixer", 1)
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{line}: {ended.stderr}"


@named(PAGES)
def test_commands_in_a_sentence_exist(page: Path) -> None:
    """`kmixer NAME --option` between backquotes names a command, options and a recipe that there are."""
    command = typer.main.get_command(app)
    for quoted in INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        words = quoted.replace("\n", " ").split()[1:]
        part: typer.core.TyperGroup | object = command
        while words and isinstance(part, typer.core.TyperGroup):
            if words[0].startswith("-") or words[0] == "...":
                break
            for name in words[0].split("|"):
                assert name in part.commands, f"{page.name}: {quoted}"
            part = part.commands[words.pop(0).split("|")[0]]
        options = {option for parameter in getattr(part, "params", []) for option in parameter.opts} | {
            "--help",
            "--debug",
        }
        unknown = [word for word in words if word.startswith("--") and word.split("=")[0].rstrip(".,") not in options]
        assert not unknown, f"{page.name}: {quoted}: {unknown}"
        if quoted.startswith(("kmixer train", "kmixer sweep")) and re.fullmatch(
            r"[a-z][a-z0-9/-]+", (words or [""])[0]
        ):
            assert words[0] in {*packaged_recipes(), *packaged_ablations()}, f"{page.name}: {quoted}"


@named(PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS
