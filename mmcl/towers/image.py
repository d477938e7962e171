"""Images to vectors: any image tower of open_clip, fed with uint8 pixels."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn


class ImageTower(nn.Module):
    """Normalises on the device, then runs `visual`, an open_clip image tower."""

    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.visual = visual
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Returns (n, d), not normalised."""
        return self.visual((pixels.float() / 255 - self.mean) / self.std)
