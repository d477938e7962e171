"""Sounds to vectors: a distilled ViT over a log-mel spectrogram, the shape of AST.

AST, Gong et al. 2021, https://arxiv.org/abs/2104.01778: patches of a mel spectrogram, a class and a distillation token
whose mean, after LayerNorm and a linear map, is the embedding. timm's `VisionTransformerDistilled` has exactly these
tokens, so that the tower maps onto other libraries' AST. The spectrogram is computed on the device from waveforms.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

from mmcl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """The audio tower and the sounds it reads."""

    sample_rate: int = 16000
    """In Hz; other rates are resampled."""
    clip_seconds: float = 10.24
    """Longer sounds are cut, shorter ones padded with silence."""
    mels: int = 128
    """Mel bins, a multiple of `patch_size`."""
    hop_ms: float = 10.0
    """Between two frames."""
    window_ms: float = 25.0
    """Length of a frame."""
    mean: float = -4.27
    """Of the log-mel values over the training set (natural log); AST's for AudioSet."""
    std: float = 4.57
    """Likewise; as in AST values are divided by twice this."""
    patch_size: int = 16
    """Side of a patch in bins and frames."""
    width: int = 768
    """Size of a token."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 12
    """Attention heads of a block."""

    @property
    def clip_samples(self) -> int:
        """Length of a sound in samples."""
        return round(self.clip_seconds * self.sample_rate)

    @property
    def hop(self) -> int:
        """Samples between two frames."""
        return round(self.hop_ms * self.sample_rate / 1000)

    @property
    def frames(self) -> int:
        """Frames of a spectrogram."""
        return self.clip_samples // self.hop

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"model.audio.width={self.width} must be a multiple of heads={self.heads}")
        for name, size in (("mels", self.mels), ("frames (clip_seconds / hop_ms)", self.frames)):
            if size < self.patch_size or size % self.patch_size:
                raise ConfigError(f"model.audio: {name}={size} must be a multiple of patch_size={self.patch_size}")


class AudioTower(nn.Module):
    """Waveforms to log-mel spectrograms to vectors."""

    def __init__(self, config: AudioConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        window = round(config.window_ms * config.sample_rate / 1000)
        self.spectrogram = MelSpectrogram(
            sample_rate=config.sample_rate,
            n_fft=1 << (window - 1).bit_length(),
            win_length=window,
            hop_length=config.hop,
            n_mels=config.mels,
            f_min=20.0,
            f_max=config.sample_rate / 2,
            power=2.0,
        )
        self.vit = VisionTransformerDistilled(
            img_size=(config.mels, config.frames),
            patch_size=config.patch_size,
            in_chans=1,
            num_classes=0,
            embed_dim=config.width,
            depth=config.layers,
            num_heads=config.heads,
        )
        self.head = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, embed_dim))

    def features(self, sound: Float[Tensor, "n t"]) -> Float[Tensor, "n 1 mels frames"]:
        """Log-mel spectrogram in float32 whatever the precision of the tower."""
        with torch.autocast(sound.device.type, enabled=False):
            mel = self.spectrogram(sound.float())[..., : self.config.frames]
            return ((mel + 1e-6).log() - self.config.mean)[:, None] / (2 * self.config.std)

    def forward(self, sound: Float[Tensor, "n t"]) -> Float[Tensor, "n d"]:
        """Returns (n, d), not normalised."""
        return self.head(self.vit(self.features(sound)))
