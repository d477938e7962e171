"""Few numbers of an image or a sound, which two decoders of the same sample share. Needs torch alone."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
"""Of CLIP's images."""
_CELLS = 8
_BANDS = 24


def thumbnails(images: Tensor) -> Tensor:
    """(n, 3, h, w) in 0..255, uint8 or float -> (n, 192), 8 x 8 cells in 0..1."""
    return avg_pool2d(images.float() / 255, images.shape[-1] // _CELLS).flatten(1)


def denormalised(images: Tensor) -> Tensor:
    """What was normalised as CLIP's images are, in 0..255."""
    return (images.float() * STD + MEAN) * 255


def spectra(waves: Tensor) -> Tensor:
    """(n, t) -> (n, 24), amplitude by band of frequency, wherever in a steady sound the wave was cut out."""
    power = torch.fft.rfft(waves.float(), norm="forward").abs().square()
    return torch.stack([band.sum(1) for band in power.chunk(_BANDS, 1)], 1).sqrt()


def rows_of(tokens: Tensor, shown: Tensor) -> list[tuple[list[int], list[float]]]:
    """For `serving.serve`."""
    return list(zip(tokens.tolist(), shown.tolist(), strict=True))
