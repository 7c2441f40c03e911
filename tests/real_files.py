"""Published tokenizer files and hub metadata, if they lie beside the repository. Tests skip without them."""

import functools
from pathlib import Path

import pytest
from transformers import Qwen2Tokenizer

from zoo import tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
SDAR, LLADA = SHARED / "hub/JetLM--SDAR-4B-Chat", SHARED / "hub/GSAI-ML--LLaDA-8B-Instruct"


def needed(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f"needs the published files of {folder.name}")
    return folder


@functools.cache
def qwen() -> tuple[tokenizer.BPETokenizer, Qwen2Tokenizer]:
    """SDAR's tokenizer, which is Qwen's: ours and that of transformers. Reading takes seconds, so once."""
    return tokenizer.load(needed(SDAR)), Qwen2Tokenizer.from_pretrained(SDAR)
