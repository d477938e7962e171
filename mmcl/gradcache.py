"""GradCache: the gradients of a batch whose graph does not fit into memory, at the price of a second forward pass.

A contrastive loss needs all embeddings at once, and not all graphs. So every chunk of rows is embedded without a graph;
the loss of the whole batch gives the gradient of each embedding; then every chunk is embedded once more, with a graph,
through which the gradients of its embeddings go back to the weights. Gao et al. 2021, https://arxiv.org/abs/2101.06983.

The loss, its gathers and the mean of gradients over ranks happen once for the batch, and random numbers are replayed,
so that the result is that of the batch in one piece, up to rounding and to what dropout draws. That holds for modules
that treat rows one by one; those that do not are refused where they can be told, which is batch norm.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from mmcl.engine import Engine
from mmcl.errors import ConfigError
from mmcl.types import MODALITIES, Batch, Modality

LossOf = Callable[[Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
"""From the outputs of the model to a loss that depends on all of them, and what else is to be told of the step."""


def backward_in_chunks(engine: Engine, batch: Batch, chunks: int, loss_of: LossOf) -> tuple[Tensor, dict[str, Tensor]]:
    """As `loss_of(engine.forward(batch.values))` and `engine.backward`, with the graph of one chunk at a time.

    Collective: every rank cuts its rows into as many chunks, some of them empty where it has too few.

    Raises:
        ConfigError: a module of the model takes statistics from the rows that it sees at once.
    """
    check_chunks(engine.model, chunks)
    parts, states, outputs = cut(batch, chunks), [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state(engine.device))
            outputs.append(engine.forward(part))
    leaves = {name: _joined([output[name] for output in outputs]).requires_grad_() for name in outputs[0]}
    sizes = [{name: len(value) for name, value in output.items() if value.ndim} for output in outputs]
    del outputs

    loss, values = loss_of(leaves)
    loss.backward()
    cached = _by_chunk({name: _gradient(name, leaf) for name, leaf in leaves.items()}, sizes)

    def of_chunk(number: int) -> Tensor:
        """A number whose gradients are what the loss wants of this chunk."""
        with _replayed(states[number], engine.device):
            again = engine.forward(parts[number])
        return torch.stack([(value * cached[number][name]).sum() for name, value in again.items()]).sum()

    engine.backward_parts([partial(of_chunk, number) for number in range(chunks)])
    return loss, values


def check_chunks(model: nn.Module, chunks: int) -> None:
    """Raise `ConfigError` if a module of `model` would give a row something else in a chunk than in the batch."""
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and _depends_on_chunk(module):
            raise ConfigError(
                f"train.accumulate={chunks}: {name} ({type(module).__name__}) takes statistics from the rows that it "
                "sees at once, a chunk and not the batch, and twice a step; choose a tower without it or "
                "train.accumulate=1, or freeze it, that is, set it to eval mode with the statistics it has"
            )


def _depends_on_chunk(norm: _NormBase) -> bool:
    """In eval mode a norm uses its running statistics if it has some; an instance norm needs none, but moves them."""
    if isinstance(norm, _BatchNorm):
        return norm.training or norm.running_mean is None
    return norm.training and norm.track_running_stats


def cut(batch: Batch, chunks: int) -> list[dict[Modality, Tensor]]:
    """What `chunks` parts of the rows of `batch` hold, one after another and as even as they go."""
    device = batch.rows[MODALITIES[0]].device
    edges = torch.arange(chunks + 1, device=device) * batch.size // chunks
    # one wait for the device
    places = torch.stack([torch.searchsorted(batch.rows[name].contiguous(), edges) for name in MODALITIES]).tolist()
    return [
        {name: batch.values[name][at[c] : at[c + 1]] for name, at in zip(MODALITIES, places, strict=True)}
        for c in range(chunks)
    ]


def _joined(parts: list[Tensor]) -> Tensor:
    """Rows of all chunks; a scalar is what the model has learnt, which every chunk gives alike."""
    return torch.cat(parts).detach() if parts[0].ndim else parts[0].detach().clone()


def _gradient(name: str, leaf: Tensor) -> Tensor:
    assert leaf.grad is not None, f"the loss does not depend on {name}"
    return leaf.grad


def _by_chunk(gradients: Mapping[str, Tensor], sizes: list[dict[str, int]]) -> list[dict[str, Tensor]]:
    """The gradients that each chunk takes back: of its rows, and of scalars in the last chunk, so that they count once.

    In the others scalars get zeros and not nothing, because engines wait for a gradient of every parameter.
    """
    found: list[dict[str, Tensor]] = [{} for _ in sizes]
    for name, gradient in gradients.items():
        if gradient.ndim:
            parts = gradient.split([size[name] for size in sizes])
        else:
            parts = [*[torch.zeros_like(gradient)] * (len(sizes) - 1), gradient]
        for chunk, part in zip(found, parts, strict=True):
            chunk[name] = part
    return found


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of torch, here and on the device: towers draw from nothing else."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _replayed(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Random numbers come from `state`; afterwards they go on as if nothing had been drawn."""
    here, there = state
    with torch.random.fork_rng([device] if there is not None else []):
        torch.set_rng_state(here)
        if there is not None:
            torch.cuda.set_rng_state(there, device)
        yield
