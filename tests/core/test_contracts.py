"""The walls hold: imports go one way, and one module touches the process group. A planted breach turns them red."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = Path(sys.executable).parent
PACKAGES = {"mmcl": ".", "mmcl_data": "data_pipelines", "mmcl_evals": "evals", "mmcl_launch": "launch"}


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the four packages and their contracts."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, folder in PACKAGES.items():
        shutil.copytree(ROOT / folder / name, tmp_path / folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def lint_imports(tree: Path) -> tuple[int, str]:
    where = os.pathsep.join(str(tree / folder) for folder in PACKAGES.values())
    ended = subprocess.run(
        [TOOLS / "lint-imports", "--no-cache", "--no-logo"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": where},
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


def ruff(tree: Path, path: str) -> tuple[int, str]:
    command = [TOOLS / "ruff", "check", "--no-cache", "--output-format", "concise", path]
    ended = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout + ended.stderr


def plant(tree: Path, path: str, line: str) -> None:
    """`line` as the first import of a module."""
    text = (tree / path).read_text()
    before, marker, after = text.partition("\nimport ")
    assert marker, path
    (tree / path).write_text(f"{before}\n{line}{marker}{after}")


def test_all_contracts_are_kept(tree):
    code, said = lint_imports(tree)
    assert code == 0, said
    assert ", 0 broken." in said


@pytest.mark.parametrize(
    ("path", "line", "contract"),
    [
        ("mmcl/train.py", "from mmcl_evals import metrics", "launch composes data and evals"),
        ("mmcl/train.py", "import deepspeed", "engines alone import deepspeed and accelerate"),
        ("mmcl/train.py", "import accelerate", "engines alone import deepspeed and accelerate"),
        ("mmcl/export.py", "import webdataset", "mmcl_data alone imports webdataset"),
        ("mmcl/optim.py", "from mmcl import train", "the core is layered"),
        ("mmcl/towers/image.py", "from mmcl.towers import audio", "towers do not know each other"),
        ("data_pipelines/mmcl_data/stream.py", "import mmcl_evals", "launch composes data and evals"),
        ("evals/mmcl_evals/suite.py", "import mmcl_launch.config", "launch composes data and evals"),
    ],
)
def test_a_planted_import_turns_its_contract_red(tree, path, line, contract):
    plant(tree, path, line)
    code, said = lint_imports(tree)
    assert code != 0
    broken = [text for text in said.splitlines() if text.endswith("BROKEN")]
    assert any(text.startswith(contract) for text in broken), said


@pytest.mark.parametrize(
    ("path", "line", "says"),
    [
        ("mmcl/train.py", "import torch.distributed", "take a Shard"),
        ("mmcl/losses/infonce.py", "import torch.distributed as dist", "take a Shard"),
        ("evals/mmcl_evals/suite.py", "from torch.distributed import all_reduce", "take a Shard"),
        ("mmcl/checkpoint.py", "import pickle", "safetensors and JSON"),
        ("mmcl/train.py", "from os import environ", "take the value as an argument"),
    ],
)
def test_ruff_refuses_what_is_banned(tree, path, line, says):
    plant(tree, path, line)
    code, said = ruff(tree, path)
    assert code != 0
    assert any("TID251" in text and says in text for text in said.splitlines()), said


def test_the_one_module_that_may_touch_the_process_group_does(tree):
    assert "import torch.distributed" in (tree / "mmcl/dist.py").read_text()
    assert "TID251" not in ruff(tree, "mmcl")[1]
