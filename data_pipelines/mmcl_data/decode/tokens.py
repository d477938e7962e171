"""open_clip's tokenizer, quicker: words are remembered with their numbers, and plain captions need no mending.

The numbers are open_clip's own. It is imported with this module, which takes seconds.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

_MAX_WORDS = 200_000
"""Remembered at most; then all are forgotten."""


class Tokenizer:
    """Captions to token numbers."""

    def __init__(self) -> None:
        self.slow = SimpleTokenizer()
        self.words: dict[str, list[int]] = {}

    def __call__(self, captions: Sequence[str], length: int) -> Int64[Tensor, "n l"]:
        """(len(captions), length): start, words, end, zeros; a longer caption is cut and still ends with the end."""
        found = np.zeros((len(captions), length), dtype=np.int64)
        for row, caption in zip(found, captions, strict=True):
            words = self.encode(caption)[: max(0, length - 2)]
            numbers = [self.slow.sot_token_id, *words, self.slow.eot_token_id][-length:]
            row[: len(numbers)] = numbers
        return torch.from_numpy(found)

    def encode(self, caption: str) -> list[int]:
        """Numbers of its words."""
        # printable ASCII without entities holds nothing that ftfy would mend
        plain = caption.isascii() and caption.isprintable() and "&" not in caption
        cleaned = " ".join(caption.split()).lower() if plain else self.slow.clean_fn(caption)
        numbers: list[int] = []
        for word in self.slow.pat.findall(cleaned):
            numbers += self.words[word] if word in self.words else self._new(word)
        return numbers

    def _new(self, word: str) -> list[int]:
        slow = self.slow
        if len(self.words) >= _MAX_WORDS:
            self.words.clear()
            slow.cache = {name: name for name in ("<start_of_text>", "<end_of_text>")}  # it too keeps every word
        signs = "".join(slow.byte_encoder[byte] for byte in word.encode())
        numbers = [slow.encoder[part] for part in slow.bpe(signs).split(" ")]
        self.words[word] = numbers
        return numbers
