"""How a pipeline in an environment of its own is asked for batches: lines of JSON on standard input and output.

    {"take": n}    take n batches; answers {"rows": r, "seconds": s}
    {"look": n}    take n batches; answers {"rows": [[tokens, thumbnail], ...]}

Only the standard library is needed here, since every environment imports this.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Rows = list[tuple[list[int], list[float]]]
"""Tokens of a row, and something by which two decoders can be compared."""


def options() -> dict[str, Any]:
    """What the pipeline was started with."""
    return json.loads(sys.argv[1])


def serve(batches: Iterator[Any], size: Callable[[Any], int], look: Callable[[Any], Rows]) -> None:
    """Answer until standard input ends. `size` says how many rows a batch has, `look` what they are."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    for line in sys.stdin:
        question = json.loads(line)
        if "look" in question:
            answer: dict[str, Any] = {"rows": [row for _ in range(question["look"]) for row in look(next(batches))]}
        else:
            began = time.perf_counter()
            rows = sum(size(next(batches)) for _ in range(question["take"]))
            answer = {"rows": rows, "seconds": time.perf_counter() - began}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
