"""Benchmarks of an encoder: what each measures is said in its module and in evals/README.md."""

from .compositional import Compositional
from .curves import draw_curves
from .metrics import accuracy_hits, pair_hits, recall_chance, recall_hits, score, wilson
from .report import markdown_table, write_report, write_results
from .retrieval import Retrieval
from .suite import Benchmark, TaskResult, run_suite
from .zeroshot import ZeroShot, templates_for

__all__ = [
    "Benchmark",
    "Compositional",
    "Retrieval",
    "TaskResult",
    "ZeroShot",
    "accuracy_hits",
    "draw_curves",
    "markdown_table",
    "pair_hits",
    "recall_chance",
    "recall_hits",
    "run_suite",
    "score",
    "templates_for",
    "wilson",
    "write_report",
    "write_results",
]
