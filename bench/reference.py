"""The reference: sentence-transformers, from files alone and without progress bars."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def sentence_transformer(folder: Path) -> "SentenceTransformer":
    from sentence_transformers import SentenceTransformer

    no_progress_bars()
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def no_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
