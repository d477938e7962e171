"""Run benchmarks one after the other and keep what a report needs."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mmcl.errors import ConfigError
from mmcl.types import Batch, Encoder, Evaluator, Modality, Score


class Benchmark(Evaluator, Protocol):
    """An evaluator that also says what kind of task it is. All of it goes into the result."""

    @property
    def task(self) -> str:
        """The kind of task, such as `zeroshot_classification`."""
        ...

    @property
    def batches(self) -> Iterable[Batch]:
        """What it is measured on."""
        ...

    @property
    def main_metric(self) -> str:
        """The figure that stands for the task in a summary."""
        ...

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What is compared with what."""
        ...

    @property
    def details(self) -> Mapping[str, Any]:
        """What the result says beyond its figures: `n_classes`, `templates_sha256`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """What one benchmark measured."""

    name: str
    task: str
    modality: str
    """Joined by a hyphen: image-text."""
    metrics: Mapping[str, Score]
    main_metric: str
    seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)


def run_suite(
    evaluators: Iterable[Benchmark],
    encoder: Encoder,
    on_score: Callable[[str, str, Score], None] | None = None,
) -> list[TaskResult]:
    """Run every benchmark; `on_score(name, metric, score)` is told each figure as it is known.

    Raises:
        ConfigError: two benchmarks have one name, so one result would overwrite the other.
    """
    evaluators = list(evaluators)
    names = [evaluator.name for evaluator in evaluators]
    if len(set(names)) < len(names):
        raise ConfigError(f"names of benchmarks must differ, found {sorted(names)}: results are filed by name")
    return [_run(evaluator, encoder, on_score) for evaluator in evaluators]


def _run(evaluator: Benchmark, encoder: Encoder, on_score: Callable[[str, str, Score], None] | None) -> TaskResult:
    start = time.perf_counter()
    metrics: dict[str, Score] = {}
    for metric, score in evaluator.run(encoder):
        metrics[metric] = score
        if on_score is not None:
            on_score(evaluator.name, metric, score)
    return TaskResult(
        name=evaluator.name,
        task=evaluator.task,
        modality="-".join(evaluator.modalities),
        metrics=metrics,
        main_metric=evaluator.main_metric
        if evaluator.main_metric in metrics
        else next(iter(metrics), evaluator.main_metric),
        seconds=time.perf_counter() - start,
        details=evaluator.details,
    )
