"""What a language model is measured on: the text that its run held out, or any other."""

from __future__ import annotations

from pathlib import Path

from kmixer.data.reading import text_source
from kmixer.data.token_cache import TokenSplit
from kmixer.data.token_files import Dataset, prepare_dataset, tokenise
from kmixer.data.tokenizers import ByteTokenizer, Tokenizer
from kmixer.errors import InputError
from kmixer.models.causal_lm import CausalLM
from kmixer.runs.recipe import LanguageRecipe, as_language
from kmixer.runs.run_folder import RunFolder

# Tokens of a window where no recipe says it.
WINDOW = 1024


def held_out(
    run: RunFolder, tokenizer: Tokenizer, corpus: str | None = None, data_dir: Path | None = None
) -> tuple[LanguageRecipe, TokenSplit]:
    """The recipe of a run and the validation part of its text.

    Args:
        run: the run folder.
        tokenizer: of its model.
        corpus: a file, a folder or a name in the place of the recipe's, where the text was moved.
        data_dir: where corpora are looked for first.

    Raises InputError where the text is gone, or is not what the run was trained on.
    """
    recipe, dataset = own_text(run, tokenizer, corpus, data_dir)
    return recipe, dataset.validation


def own_text(
    run: RunFolder, tokenizer: Tokenizer, corpus: str | None = None, data_dir: Path | None = None
) -> tuple[LanguageRecipe, Dataset]:
    """The recipe of a run and all parts of its text; arguments and errors as of `held_out`."""
    recipe = as_language(run.recipe_with_data(corpus))
    dataset = prepare_dataset(recipe.data, tokenizer, data_dir)
    run.check_data(dataset.sha256)
    return recipe, dataset


def check_one_text(text: str | None, corpus: str | None) -> None:
    """Raises InputError where both another text and the place of the run's own are given."""
    if text is not None and corpus is not None:
        raise InputError("--text measures on another text, --corpus says where the run's own is; give one of them")


def read_tokens(source: str, tokenizer: Tokenizer) -> TokenSplit:
    """A whole text file or, for "-", standard input. Raises InputError where it cannot be read or is empty."""
    with text_source(source, raw=isinstance(tokenizer, ByteTokenizer)) as blocks:
        return tokenise(blocks, tokenizer)


def window_for(run: RunFolder, model: CausalLM, split: TokenSplit) -> int:
    """Tokens of a window for another text than the run's: the run's own, or WINDOW, as far as model and text go."""
    recipe = run.read_recipe() if run.exists() else None
    window = recipe.evaluation_window if isinstance(recipe, LanguageRecipe) else WINDOW
    return min(window, model.config.max_positions or window, max(1, len(split.tokens) - 1))
