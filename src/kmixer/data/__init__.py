"""Data: corpora, tokenizers, memory-mapped token files, batches."""

from kmixer.data.corpora import CORPORA, find_corpus
from kmixer.data.token_cache import TokenSplit
from kmixer.data.token_files import Dataset, prepare_dataset

__all__ = ["CORPORA", "Dataset", "TokenSplit", "find_corpus", "prepare_dataset"]
