"""Draw a run from its metrics.jsonl: losses, learning rate and scales, and scores against what guessing reaches."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcl.errors import DataError, MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = Mapping[str, Mapping[int, float]]
"""Of each key its values by step."""
SCORE, CHANCE = "eval/", "eval_chance/"
SECOND_RANKS = ("_r5", "_r10")
"""Retrieval beyond the first rank is in the tables: here it would only crowd out the other curves."""


def read_curves(path: Path) -> Curves:
    """Every number that was logged, by key and step, the steps ascending; null, which stands for no finite one, as NaN.

    A line that cannot be read is left out, for a run that is killed may leave half of one. Where a step occurs again,
    because the run was resumed before it, the later line counts.

    Raises:
        DataError: no line with a step can be read.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file: expected the metrics.jsonl of a run")
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        entry = _entry(line)
        for key, value in entry.items():
            if key != "step" and (value is None or isinstance(value, int | float)):
                curves[key][entry["step"]] = math.nan if value is None else float(value)
    if not curves:
        raise DataError(f"{path}: holds no line with a step and a value: the run may not have logged yet")
    return {key: dict(sorted(points.items())) for key, points in curves.items()}


def _entry(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else {}


def draw_curves(metrics_jsonl: Path, out: Path) -> tuple[Path, Path]:
    """Draw `metrics_jsonl` to `out.png` and `out.svg`.

    Raises:
        DataError: nothing to draw.
        MissingExtra: matplotlib is absent.
    """
    curves = read_curves(metrics_jsonl)
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "report", "drawing the curves") from error

    legend_rows = sum(_is_drawn(key) for key in curves) // 2
    figure = Figure(figsize=(15, 5 + 0.16 * legend_rows))
    figure.set_layout_engine("constrained", w_pad=0.12)
    FigureCanvasAgg(figure)
    losses, schedule, scores = figure.subplots(1, 3)
    _draw_losses(losses, curves)
    _draw_schedule(schedule, curves)
    _draw_scores(scores, curves)
    stem = out.with_suffix("") if out.suffix in (".png", ".svg") else out
    png, svg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)
    with rc_context({"svg.hashsalt": "mmcl"}):  # the same run gives the same file
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


def _draw_losses(axes: "Axes", curves: Curves) -> None:
    names = [key for key in curves if key == "loss" or key.startswith("loss_")]
    for index, key in enumerate(sorted(names)):
        _plot(axes, curves[key], _words(key), index, linewidth=2.2 if key == "loss" else 1.4)
    _finish([axes], "Loss", "loss")


def _draw_schedule(axes: "Axes", curves: Curves) -> None:
    """Rates on the left, scales, which are thousands of times larger, on the right."""
    rates = sorted(key for key in curves if key == "lr" or key.startswith("lr_"))
    scales = sorted(key for key in curves if key.startswith("scale"))
    panels = [axes]
    for index, key in enumerate(rates):
        _plot(axes, curves[key], _words(key).replace("lr", "learning rate"), index, linewidth=2.2)
    if scales:
        right = axes.twinx()
        panels.append(right)
        for index, key in enumerate(scales, start=len(rates)):
            _plot(right, curves[key], _words(key), index, linestyle="-.")
        right.set_ylabel("scale (1 / temperature)")
    _finish(panels, "Learning rate and scales", "learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _draw_scores(axes: "Axes", curves: Curves) -> None:
    names = sorted(key for key in curves if _is_drawn(key))
    for index, key in enumerate(names):
        _plot(axes, curves[key], key.removeprefix(SCORE), index, marker="o", markersize=3)
    levels: dict[float, list[int]] = defaultdict(list)
    for index, key in enumerate(names):
        chance = curves.get(CHANCE + key.removeprefix(SCORE), {})
        if chance:
            levels[list(chance.values())[-1]].append(index)
    for level, users in levels.items():  # one line a level, grey where several curves share it
        colour = _colour(users[0]) if len(users) == 1 else "0.45"
        axes.axhline(level, color=colour, linestyle="--", linewidth=1)
    if levels:
        axes.plot([], [], color="0.45", linestyle="--", linewidth=1, label="chance")
    axes.set_ylim(-0.02, 1.02)
    _finish([axes], "Scores", "score (fraction right)")


def _is_drawn(key: str) -> bool:
    return key.startswith(SCORE) and not key.endswith(SECOND_RANKS)


def _plot(axes: "Axes", points: Mapping[int, float], label: str, index: int, **style: Any) -> None:
    """One curve; a value that is not finite leaves a gap."""
    values = [value if math.isfinite(value) else math.nan for value in points.values()]
    marker = {"marker": "o", "markersize": 3} if len(points) < 3 else {}
    axes.plot(list(points), values, label=label, color=_colour(index), **{"linewidth": 1.4, **marker, **style})


def _finish(panels: "Iterable[Axes]", title: str, ylabel: str) -> None:
    """Labels, a grid, and the legend below the axes, where no curve runs."""
    axes, *others = panels
    axes.set(title=title, xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    for other in others:
        more = other.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    if handles:
        columns = 2 if len(handles) > 3 else max(len(handles), 1)
        axes.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, fontsize=8, frameon=False
        )
    else:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color="0.5")


def _words(key: str) -> str:
    return key.replace("_", " ")


def _colour(index: int) -> tuple[float, float, float]:
    """Ten clear colours and then their pale variants."""
    from matplotlib import colormaps

    shade = colormaps["tab20"](index % 10 * 2 + index // 10 % 2)
    return shade[0], shade[1], shade[2]
