"""Put results where people and other programs read them: JSON by task, a table, curves.

The JSON is result schema v1, a superset of what `clip_benchmark build` reads: fractions, never percent, and null where
a figure is undefined.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmcl.types import Score

from .suite import TaskResult

SCHEMA_VERSION = 1


def write_results(
    results: Sequence[TaskResult],
    folder: Path,
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    env: Mapping[str, Any],
) -> list[Path]:
    """Write each result to `folder/{task}__{name}.json`, whole or not at all, and return the paths.

    `model` holds `name` and `pretrained` (which weights: step_120000) and whatever describes them (`weights_sha256`,
    `format`, `step`, `samples_seen`, `embed_dim`, `preprocess_sha256`); `env` is kept as it is, and `data` too, beside
    what a result's `details["data"]` says of its own.
    """
    paths = []
    for result in results:
        path = folder / f"{result.task}__{result.name.replace('/', '_')}.json"
        content = _finite(result_json(result, model=model, data=data, env=env))
        _write(path, json.dumps(content, allow_nan=False, indent=1, ensure_ascii=False) + "\n")
        paths.append(path)
    return paths


def result_json(
    result: TaskResult, *, model: Mapping[str, Any], data: Mapping[str, Any], env: Mapping[str, Any]
) -> dict[str, Any]:
    """One result by result schema v1."""
    main = result.metrics.get(result.main_metric)
    details = dict(result.details)
    about_model = dict(model)
    prompts = {"templates_sha256": details.pop("templates_sha256")} if "templates_sha256" in details else {}
    about_data = {**data, **details.pop("data", {}), **prompts}
    return {
        "dataset": result.name,
        "model": about_model.pop("name", None),
        "pretrained": about_model.pop("pretrained", None),
        "task": result.task,
        "language": "en",
        "metrics": {metric: score.value for metric, score in result.metrics.items()},
        "mmcl": {
            "schema_version": SCHEMA_VERSION,
            "main_metric": result.main_metric,
            "higher_is_better": True,
            "modality": result.modality,
            "n": main.n if main else 0,
            "n_classes": details.pop("n_classes", None),
            "ci95": {metric: [score.low, score.high] for metric, score in result.metrics.items()},
            "ci_method": "wilson",
            "chance": main.chance if main else None,
            "by_metric": {metric: {"n": s.n, "chance": s.chance} for metric, s in result.metrics.items()},
            **details,
            "preprocess_sha256": about_model.pop("preprocess_sha256", None),
            "model": about_model,
            "data": about_data,
            "env": dict(env),
            "seconds": round(result.seconds, 3),
        },
    }


def markdown_table(results: Sequence[TaskResult]) -> str:
    """All figures of all results, one a row, as fractions."""
    lines = [
        "| task | metric | score | chance | times chance | 95 % interval | n |",
        "|---|---|---:|---:|---:|:---:|---:|",
    ]
    for result in results:
        lines += [f"| {result.name} | {metric} | {_cells(score)} |" for metric, score in result.metrics.items()]
    return "\n".join(lines) + "\n"


def _cells(score: Score) -> str:
    times = f"{score.value / score.chance:.1f}" if score.chance > 0 and math.isfinite(score.value) else "-"
    value = f"{score.value:.3f}" if math.isfinite(score.value) else "-"
    return f"{value} | {score.chance:.3f} | {times} | {score.low:.3f} to {score.high:.3f} | {score.n}"


def write_report(
    results: Sequence[TaskResult], folder: Path, *, title: str, reproduce: str, plots: Sequence[Path] = ()
) -> Path:
    """Write `folder/report.md`: the table, the command that makes it again, and the curves."""
    parts = [f"# {title}\n", markdown_table(results)]
    parts.append(
        "Ties count against the model. Intervals are Wilson's for independent decisions; "
        "those of retrieval share their candidates, so read them as a guide.\n"
    )
    parts.append(f"To reproduce:\n\n```\n{reproduce}\n```\n")
    links = [(plot.name, Path(os.path.relpath(plot, folder)).as_posix()) for plot in plots]
    parts += [f"![{name}]({link})\n" if name.endswith(".png") else f"[{name}]({link})\n" for name, link in links]
    path = folder / "report.md"
    _write(path, "\n".join(parts))
    return path


def _finite(value: Any) -> Any:
    """The same tree with null for numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    """A reader finds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.tmp")
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, path)
