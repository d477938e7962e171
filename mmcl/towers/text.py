"""Captions to vectors: any text tower of open_clip, fed with tokens."""

from jaxtyping import Float, Int
from torch import Tensor, nn


class TextTower(nn.Module):
    """Runs `text`, an open_clip text tower."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, tokens: Int[Tensor, "n l"]) -> Float[Tensor, "n d"]:
        """Returns (n, d), not normalised."""
        return self.text(tokens)
