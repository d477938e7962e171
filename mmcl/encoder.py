"""A model as evaluations see it: batches and captions in, unit vectors on the CPU out, no gradients."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmcl.model import ThreeTowers, split_outputs
from mmcl.types import ID_KINDS, Batch, Embeddings, InputSpec, Modality

Forward = Callable[[Mapping[Modality, Tensor]], dict[str, Tensor]]


class TowersEncoder:
    """Encodes with `model`, through `forward` where an engine must take part (then every rank calls alike)."""

    def __init__(
        self,
        model: ThreeTowers,
        spec: InputSpec,
        tokenize: Callable[[Sequence[str]], Tensor],
        *,
        device: torch.device,
        forward: Forward | None = None,
        captions_at_once: int = 256,
    ) -> None:
        self.model, self.spec, self.tokenize = model, spec, tokenize
        self.device, self.forward, self.captions_at_once = device, forward or model, captions_at_once

    @torch.no_grad()
    def embed(self, batch: Batch) -> Embeddings:
        """Unit embeddings of whatever the batch holds, (n, d) float32 on the CPU."""
        training = self.model.training
        self.model.eval()
        try:
            on_device = batch.to(self.device)
            embeddings, _ = split_outputs(self.forward(on_device.values), on_device)
        finally:
            self.model.train(training)
        return Embeddings(
            values={name: value.float().cpu() for name, value in embeddings.values.items()}, rows=batch.rows
        )

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Unit embeddings of captions, (len(texts), d) float32 on the CPU."""
        parts = []
        for first in range(0, len(texts), self.captions_at_once):
            tokens = self.tokenize(texts[first : first + self.captions_at_once])
            nobody = torch.zeros(0, dtype=torch.long)
            values = self.spec.nothing()
            values["text"] = tokens
            batch = Batch(
                size=len(tokens),
                values=values,
                rows={"image": nobody, "text": torch.arange(len(tokens)), "audio": nobody},
                ids=torch.full((len(tokens), len(ID_KINDS)), -1),
                seeds=torch.zeros(len(tokens), dtype=torch.long),
            )
            parts.append(self.embed(batch).values["text"])
        return torch.cat(parts)
