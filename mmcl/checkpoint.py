"""Checkpoints as directories of safetensors and JSON that appear whole or not at all.

    step-000000120/
      state.safetensors   model/NAME, exp_avg/NAME, exp_avg_sq/NAME
      manifest.json       step, what must not change on resume, sha256 of the other file

Rank 0 writes, into a staged directory that is renamed when everything is on disk. No pickle is written or read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcl.errors import CheckpointError

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A checkpoint as read back."""

    step: int
    state: dict[str, Tensor]
    facts: dict[str, Any]
    digest: str = ""
    """sha256 of the file of tensors."""


class Checkpoints(Protocol):
    """Where a run keeps its states."""

    def save(self, step: int, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep a state; on return it survives a crash."""
        ...

    def latest(self) -> Saved | None:
        """The state of the highest step, None where nothing was ever saved.

        Raises:
            CheckpointError: there is a checkpoint and it is damaged: that is never a fresh start.
        """
        ...


class DirectoryCheckpoints:
    """Checkpoints under one directory; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        try:
            self._save(step, state, facts)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder}: step {step} cannot be written: {error}") from error

    def _save(self, step: int, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        final = self.folder / f"step-{step:09d}"
        staged = self.folder / f".tmp-{final.name}"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        tensors = staged / "state.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, tensors)
        manifest = {"format": FORMAT, "step": step, "facts": dict(facts), "sha256": {tensors.name: sha256(tensors)}}
        (staged / "manifest.json").write_text(json.dumps(manifest, indent=1, allow_nan=False))
        for path in (tensors, staged / "manifest.json", staged):
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        staged.rename(final)
        _sync(self.folder)
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> Saved | None:
        found = self._steps()
        return read_checkpoint(found[-1]) if found else None

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-" + "[0-9]" * 9))  # not one that was renamed to be out of the way


def read_checkpoint(folder: Path) -> Saved:
    """Read and verify one checkpoint directory.

    Raises:
        CheckpointError: it is missing, incomplete, of another format, or its bytes are not those that were written.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        tensors = folder / "state.safetensors"
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder}: format {manifest['format']}, this version of mmcl reads {FORMAT}")
        if not tensors.is_file():  # a device would be read without end
            raise CheckpointError(f"{folder}: {tensors.name} is no file; move this directory away")
        if sha256(tensors) != manifest["sha256"][tensors.name]:
            raise CheckpointError(
                f"{tensors}: its sha256 is not the one in manifest.json, so the file was damaged after it was written; "
                "move this directory away to resume from the one before"
            )
        digest = manifest["sha256"][tensors.name]
        return Saved(step=manifest["step"], state=load_file(tensors), facts=manifest["facts"], digest=digest)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}: no readable checkpoint: {type(error).__name__}: {error}; "
            "move this directory away to resume from the one before"
        ) from error


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
