"""No input runs code, starts a process, calls a server, takes more than 5 s or 512 MB, or ends in an untyped error."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import CANARY, CORPUS

SECONDS, BYTES = 5.0, 512 * 2**20


@pytest.fixture(scope="module")
def let_loose(tmp_path_factory) -> Iterator[Callable[[str], dict[str, Any] | None]]:
    """Tries out an input of the corpus by name."""
    root = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, str(Path(__file__).parent / "box.py"), str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as box:
        assert json.loads(box.stdout.readline()) == "ready"

        def ask(name: str) -> dict[str, Any] | None:
            print(json.dumps(name), file=box.stdin, flush=True)
            return json.loads(box.stdout.readline())

        yield ask
        box.stdin.close()
        assert box.wait(30) == 0


@pytest.mark.parametrize("name", CORPUS)
def test_a_hostile_input_does_no_harm_and_is_refused_by_a_typed_error(let_loose, name):
    told = let_loose(name)
    assert told is not None, "it never ended, or ended its process"
    assert told["offences"] == [] and not told["canary"]
    assert told["error"] == CORPUS[name].raises, told["text"]
    assert told["typed"] and CORPUS[name].says in told["text"], told["text"]
    assert told["seconds"] < SECONDS
    assert told["bytes"] < BYTES


def test_the_corpus_is_as_large_as_it_was_said_to_be():
    assert len(CORPUS) >= 45


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("runs a command", "subprocess.Popen"),
        ("unpickles", "pickle.find_class"),
        ("calls a server", "socket.connect"),
        ("writes elsewhere", "writes"),
    ],
)
def test_harm_would_be_seen(let_loose, name, seen):
    told = let_loose(name)
    assert any(seen in offence for offence in told["offences"])
    assert told["canary"] is (name == "runs a command")
    for canary in Path(told["folder"]).glob(CANARY):
        canary.unlink()


def test_memory_would_be_seen(let_loose):
    assert let_loose("takes 600 MB")["bytes"] > BYTES
