"""What the ranks of the GradCache tests run, importable by name: spawned processes import it again."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from rank_cases import CPU, OPTIM, WEIGHTS, make_engine, mean_over_ranks, own_rows
from torch import Tensor, nn

from mmcl import losses
from mmcl.dist import Shard, connect, disconnect, free_port
from mmcl.engine import Engine, PlainEngine
from mmcl.gradcache import LossOf, backward_in_chunks, cut
from mmcl.losses import HardNegatives, Positives
from mmcl.model import split_outputs
from mmcl.objective import Objective, ObjectiveConfig
from mmcl.optim import OptimConfig
from mmcl.terms import GlobalContrastConfig, InfoNCEConfig, Method, PairTerm
from mmcl.testing import FakeStream, fake_batch, tiny_config, tiny_model
from mmcl.train import train_step, weigh
from mmcl.types import MODALITIES, Batch

CHUNKS = (1, 4, 7)
SPLITS = {1: (13,), 2: (8, 5)}
"""Rows of each rank: 5 rows in 7 chunks leave two of them empty."""
REDUCING = ("plain", "zero2", "zero3")
"""Engines whose sums over ranks are counted: those that differ in how they make them."""
MASKS = {name: [(row + lacking) % 4 != 0 for row in range(13)] for lacking, name in enumerate(MODALITIES)}
BIASED: dict[str, Any] = {"init_bias": -5.0}
"""Of models, for the sigmoid loss."""
Gradients = dict[str, Tensor]


def ragged_batch(shard: Shard, seed: int = 0) -> Batch:
    """This rank's part of 13 rows, of which each modality is missing in every fourth; two captions appear twice."""
    batch = fake_batch(tiny_config(), MASKS, seed, own_rows(SPLITS[shard.world], shard.rank))
    return replace(batch, ids=batch.ids % 7)


def objectives() -> dict[str, Objective]:
    """One for each kind of term that a config can name, each method of global contrast, and one of nearly all."""
    on: dict[str, Any] = {
        name: replace(term, weights=WEIGHTS) if isinstance(term, PairTerm) else replace(term, weight=0.5)
        for name, term in ObjectiveConfig().terms()
        if name != "global_contrast"
    }
    on["mixup"] = replace(on["mixup"], rows=0.0)  # what is drawn after one forward pass is not what is after two
    kinds = {name: {name: term} for name, term in on.items()}
    for method in get_args(Method):
        falls = 4 if method.startswith("fastclip") else 0
        kinds[method] = {"global_contrast": GlobalContrastConfig(weights=WEIGHTS, method=method, gamma_steps=falls)}
    masked = {name: term for name, term in on.items() if term.masks}
    kinds["all"] = masked | kinds["isogclr"] | {"false_negatives": ["caption"]}
    off = {"info_nce": InfoNCEConfig(weights={})}
    return {name: Objective(ObjectiveConfig(**(off | kind))) for name, kind in kinds.items()}


def of_objective(batch: Batch, shard: Shard, objective: Objective) -> LossOf:
    """As `train_step` has it, but that each call starts from the same past."""
    start = {name: tensor.clone() for name, tensor in objective.state().items()}

    def loss_of(outputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        objective.load(start)
        embeddings, learned = split_outputs(outputs, batch)
        return weigh(objective.terms(embeddings, learned, batch.ids, shard, {}), embeddings, learned)

    return loss_of


def options(n: int, texts: Tensor) -> dict[str, dict[str, Any]]:
    """What some losses want beside pairs, and what more each can take: numbers that follow from the rows alone."""
    wrong = {"values": texts.roll(1, 0), "rows": torch.arange(len(texts)) % max(1, n)}
    if not n:
        wrong = {"values": texts[:0], "rows": torch.arange(0)}
    hard = HardNegatives(**wrong, seen_by="all")
    ids = (torch.arange(n) % 3)[:, None]
    return {
        "info_nce": {"same": ids, "weights": torch.linspace(0.5, 2.0, n), "smoothing": 0.1, "negatives": hard},
        "dcl": {"sigma": 0.5, "same": ids, "negatives": hard},
        "hn_nce": {"alpha": 0.9, "same": ids, "negatives": hard},
        "multi_positive": {"groups": ids[:, 0], "negatives": hard},
        "modular": {"positives": Positives(**wrong), "negatives": replace(hard, seen_by="own")},
        "mixup": {"share": torch.linspace(0.2, 0.9, n), "other": torch.arange(n).flip(0)},
    }


def functions() -> list[str]:
    """Names of the losses on one pair: those that can be called on pairs alone, and those in `options`."""

    def wants(function: Callable[..., Any]) -> list[str]:
        return [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]

    named = {name: f for name, f in vars(losses).items() if inspect.isfunction(f)}
    return sorted(
        name for name, f in named.items() if name in options(0, torch.zeros(0, 1)) or wants(f) == [*"xy", "scale"]
    )


def of_function(batch: Batch, shard: Shard, name: str, *, bare: bool) -> LossOf:
    """A loss on images and captions, with all options or, where that is possible, none."""

    def loss_of(outputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        embeddings, learned = split_outputs(outputs, batch)
        x, y = embeddings.pair("image_text")
        more = {} if bare else options(len(x), embeddings.values["text"])[name]
        loss = getattr(losses, name)(x, y, learned.scales["image_text"], shard, **more)
        return loss + 0.0 * sum(value.sum() for value in outputs.values()), {}

    return loss_of


def every_loss(batch: Batch, shard: Shard) -> dict[str, LossOf]:
    found = {f"objective {name}": of_objective(batch, shard, entry) for name, entry in objectives().items()}
    for name in functions():
        if name not in ("mixup", "modular", "multi_positive"):
            found[f"{name} bare"] = of_function(batch, shard, name, bare=True)
        if name in options(0, torch.zeros(0, 1)):
            found[name] = of_function(batch, shard, name, bare=False)
    return found


def gradients(engine: Engine) -> Gradients:
    """Of all parameters, averaged over ranks and whole, as the optimizer is about to get them. Collective."""
    if any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in engine.model.parameters()):
        from deepspeed.utils import safe_get_full_grad

        read: Callable[[nn.Parameter], Any] = safe_get_full_grad
    else:
        read = lambda parameter: parameter.grad  # noqa: E731
    found = {name: read(parameter) for name, parameter in engine.model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return {name: gradient.detach().clone() for name, gradient in found.items()}


def whole_or_chunks(engine: Engine, batch: Batch, chunks: int | None, loss_of: LossOf) -> tuple[Tensor, Gradients]:
    """Loss and gradients of the batch in one piece (None), or in chunks; the weights stay as they are."""
    if chunks is None:
        loss, _ = loss_of(engine.forward(batch.values))
        engine.backward(loss)
    else:
        loss, _ = backward_in_chunks(engine, batch, chunks, loss_of)
    found = gradients(engine)
    engine.step(0.0)
    return loss.detach(), found


def off(found: Gradients, expected: Gradients) -> tuple[float, str]:
    """The largest error of any tensor, relative to its largest element or a thousandth of the largest of all; its name.

    Some gradients are 0 but for rounding, such as those of biases of attention keys.
    """
    assert found.keys() == expected.keys()
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    assert largest > 0, "nothing to compare"
    return max(
        (
            ((found[name] - tensor).abs().max() / max(tensor.abs().max().item(), 1e-3 * largest)).item(),
            name,
        )
        for name, tensor in expected.items()
    )


def loss_errors(shard: Shard) -> dict[tuple[str, int], tuple[float, str]]:
    """Of every loss in so many chunks, against the batch in one piece on the same ranks."""
    engine = PlainEngine(tiny_model(**BIASED), OptimConfig(), CPU, shard)
    batch, found = ragged_batch(shard), {}
    for name, loss_of in every_loss(batch, shard).items():
        loss, expected = whole_or_chunks(engine, batch, None, loss_of)
        for chunks in CHUNKS:
            again, cached = whole_or_chunks(engine, batch, chunks, loss_of)
            worst, where = off(cached, expected)
            found[name, chunks] = max((worst, where), (abs((again - loss) / loss).item(), "loss"))
    return found


def whole_gradients(shard: Shard) -> dict[str, Any]:
    """Of the batch in one piece, all objectives at once; the rank's loss under `loss`."""
    engine, batch = PlainEngine(tiny_model(**BIASED), OptimConfig(), CPU, shard), ragged_batch(shard)
    loss, found = whole_or_chunks(engine, batch, None, of_objective(batch, shard, objectives()["all"]))
    return {name: gradient.numpy() for name, gradient in found.items()} | {"loss": mean_over_ranks(loss, shard).numpy()}


def engine_errors(shard: Shard, kinds: Sequence[str], expected: Mapping[str, Any]) -> dict[tuple[str, int | None], Any]:
    """Of every engine, gradients in one piece and in chunks against those that one process has without chunks."""
    wanted = {name: torch.from_numpy(value) for name, value in expected.items()}
    loss = wanted.pop("loss")
    batch, found = ragged_batch(shard), {}
    for kind in kinds:
        engine = make_engine(kind, shard, OptimConfig(), **BIASED)
        loss_of = of_objective(batch, shard, objectives()["all"])
        for chunks in (None, *CHUNKS):
            own, cached = whole_or_chunks(engine, batch, chunks, loss_of)
            wrong = abs((mean_over_ranks(own, shard) - loss) / loss).item()
            found[kind, chunks] = max(off(cached, wanted), (wrong, "loss"))
    return found


def alone(_: Shard, kinds: Sequence[str], expected: Mapping[str, Any]) -> dict[tuple[str, int | None], Any]:
    """`engine_errors` on the only rank of a process group, which DeepSpeed and accelerate want even for one."""
    shard = connect(0, 1, "127.0.0.1", free_port())
    try:
        return engine_errors(shard, kinds, expected)
    finally:
        disconnect()


def trained(shard: Shard, kind: str, chunks: int, *, bf16: bool = False) -> list[dict[str, float]]:
    """Metrics of four steps, the last one watched."""
    engine = make_engine(kind, shard, OPTIM, bf16=bf16, **BIASED)
    objective = objectives()["all"]
    batches = FakeStream(tiny_config(), shard=shard).batches()
    return [
        shard.mean(train_step(engine, next(batches), objective, 1e-3, chunks=chunks, watch=number == 3))
        for number in range(4)
    ]


def reduced(shard: Shard, kind: str, chunks: int) -> list[int]:
    """Elements of all sums over ranks in the second step of an engine; some make their buckets in the first."""
    engine, batch = make_engine(kind, shard, OptimConfig(), **BIASED), ragged_batch(shard)
    train_step(engine, batch, objectives()["info_nce"], 0.0, chunks=chunks)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        train_step(engine, batch, objectives()["info_nce"], 0.0, chunks=chunks)
    events: Any = profile.profiler
    sums = [event for event in events.kineto_results.events() if event.name() == "gloo:all_reduce"]
    return sorted(math.prod(shape) for event in sums for shape in event.shapes())


class Dropping(nn.Module):
    """A tower whose outputs have holes, drawn anew for every row."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower, self.dropout = tower, nn.Dropout(0.3)

    def forward(self, values: Tensor) -> Tensor:
        return self.dropout(self.tower(values))


def with_dropout() -> nn.Module:
    """Holes in the outputs of two towers, and patches dropped in the third, as open_clip does."""
    clip: Any = tiny_config().clip
    model = tiny_model(clip=clip | {"vision_cfg": clip["vision_cfg"] | {"patch_dropout": 0.5}})
    for name in ("text", "audio"):
        model.towers[name] = Dropping(model.towers[name])
    return model


def dropout_errors(shard: Shard) -> dict[str, Any]:
    """Chunks with all their graphs kept, against chunks that are computed twice, from the same random numbers."""
    engine, batch, chunks = PlainEngine(with_dropout(), OptimConfig(), CPU, shard), ragged_batch(shard), 4
    loss_of = of_objective(batch, shard, objectives()["info_nce"])

    def seed(number: int) -> None:
        torch.manual_seed(1000 * number + shard.rank)

    seed(0)
    outputs = [engine.model(part) for part in cut(batch, chunks)]
    loss, _ = loss_of(
        {name: torch.cat([o[name] for o in outputs]) if value.ndim else value for name, value in outputs[0].items()}
    )
    loss.backward()
    after = torch.get_rng_state()
    expected = {
        name: mean_over_ranks(p.grad, shard) for name, p in engine.model.named_parameters() if p.grad is not None
    }
    engine.optimizer.zero_grad()
    found: dict[str, Any] = {}
    for number, name in ((0, "replayed"), (1, "of another seed")):
        seed(number)
        again, cached = whole_or_chunks(engine, batch, chunks, loss_of)
        found[name] = (*off(cached, expected), abs((again - loss) / loss).item())
        if number == 0:
            found["random numbers go on"] = torch.equal(torch.get_rng_state(), after)
    return found


def rank_suite(shard: Shard, kinds: Sequence[str], expected: Mapping[str, Any]) -> dict[str, Any]:
    """All of the above on several ranks, in one life of the processes."""
    return {
        "losses": loss_errors(shard),
        "engines": engine_errors(shard, kinds, expected),
        "trained": {(kind, 4): trained(shard, kind, 4) for kind in kinds} | {("plain", 1): trained(shard, "plain", 1)},
        "bf16": {(kind, n): trained(shard, kind, n, bf16=True) for kind in ("zero2",) for n in (1, 4)},
        "reduced": {(kind, n): reduced(shard, kind, n) for kind in REDUCING for n in (1, 2)},
        "dropout": dropout_errors(shard),
    }


class Saved:
    """Bytes that graphs keep for their backward pass: now and at most."""

    def __init__(self, model: nn.Module) -> None:
        self.now = self.most = 0
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __enter__(self) -> "Saved":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: Kept(self, tensor), lambda kept: kept.tensor
        )
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)


class Kept:
    """One of them."""

    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.saved, self.tensor = saved, tensor
        self.bytes = 0 if tensor.untyped_storage().data_ptr() in saved.weights else tensor.nbytes
        saved.now += self.bytes
        saved.most = max(saved.most, saved.now)

    def __del__(self) -> None:
        self.saved.now -= self.bytes
