"""A checkpoint is whole, or it is an error: never a fresh start, and never a pickle."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from mmcl.checkpoint import DirectoryCheckpoints, read_checkpoint
from mmcl.errors import CheckpointError

STATE = {"model/w": torch.arange(6.0).reshape(2, 3), "exp_avg/w": torch.ones(2, 3)}
FACTS = {"stream": {"seed": 3}}


@pytest.fixture
def kept(tmp_path):
    """Checkpoints of steps 5 and 10."""
    checkpoints = DirectoryCheckpoints(tmp_path / "checkpoints")
    for step in (5, 10):
        checkpoints.save(step, {name: tensor + step for name, tensor in STATE.items()}, FACTS)
    return checkpoints


def newest(kept):
    return kept.folder / "step-000000010"


def test_what_was_saved_last_comes_back(kept):
    saved = kept.latest()
    assert (saved.step, saved.facts) == (10, FACTS)
    assert saved.state.keys() == STATE.keys()
    assert all(torch.equal(saved.state[name], tensor + 10) for name, tensor in STATE.items())


def test_where_nothing_was_ever_saved_there_is_none(tmp_path):
    assert DirectoryCheckpoints(tmp_path / "none").latest() is None
    (tmp_path / "empty").mkdir()
    assert DirectoryCheckpoints(tmp_path / "empty").latest() is None


def test_steps_are_ordered_as_numbers(tmp_path):
    checkpoints = DirectoryCheckpoints(tmp_path, keep=9)
    for step in (999, 1000, 20):
        checkpoints.save(step, STATE, FACTS)
    assert checkpoints.latest().step == 1000


def test_only_the_newest_stay(tmp_path):
    checkpoints = DirectoryCheckpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, STATE, FACTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002", "step-000000003"]


def test_saving_a_step_again_replaces_it(kept):
    kept.save(10, STATE, FACTS)
    assert torch.equal(kept.latest().state["model/w"], STATE["model/w"])


def test_a_tensor_that_is_a_view_is_saved_whole(tmp_path):
    checkpoints = DirectoryCheckpoints(tmp_path)
    checkpoints.save(1, {"model/w": torch.arange(6.0).reshape(2, 3).T}, FACTS)
    assert torch.equal(checkpoints.latest().state["model/w"], torch.arange(6.0).reshape(2, 3).T)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def rewrite(folder, **fields):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGE = {
    "a bit flipped in the weights": lambda folder: flip(folder / "state.safetensors", -1),
    "a bit flipped in the header": lambda folder: flip(folder / "state.safetensors", 0),
    "weights cut off": lambda folder: (folder / "state.safetensors").write_bytes(b""),
    "weights missing": lambda folder: (folder / "state.safetensors").unlink(),
    "manifest missing": lambda folder: (folder / "manifest.json").unlink(),
    "manifest cut off": lambda folder: (folder / "manifest.json").write_text('{"format": 1, "st'),
    "manifest empty": lambda folder: (folder / "manifest.json").write_text(""),
    "manifest no text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "manifest a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "manifest null": lambda folder: (folder / "manifest.json").write_text("null"),
    "manifest without fields": lambda folder: (folder / "manifest.json").write_text("{}"),
    "unknown format": lambda folder: rewrite(folder, format=2),
    "digests of the wrong kind": lambda folder: rewrite(folder, sha256=None),
    "everything missing": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_an_error_that_names_it_and_never_a_fresh_start(kept, damage):
    damage(newest(kept))
    with pytest.raises(CheckpointError, match="step-000000010"):
        kept.latest()


def test_a_file_in_place_of_a_checkpoint_is_an_error(kept):
    (kept.folder / "step-000000020").write_text("not a directory")
    with pytest.raises(CheckpointError, match="step-000000020"):
        kept.latest()


def test_the_advice_for_a_damaged_checkpoint_works(kept):
    flip(newest(kept) / "state.safetensors", -1)
    with pytest.raises(CheckpointError, match="move this directory away"):
        kept.latest()
    newest(kept).rename(kept.folder / "step-000000010.damaged")
    assert kept.latest().step == 5


def test_what_an_interrupted_save_left_is_no_checkpoint(kept):
    staged = kept.folder / ".tmp-step-000000015"
    staged.mkdir()
    (staged / "state.safetensors").write_bytes(b"half")
    assert kept.latest().step == 10
    kept.save(15, STATE, FACTS)
    assert kept.latest().step == 15 and not staged.exists()


def test_a_checkpoint_that_cannot_be_written_is_an_error_that_says_where(tmp_path):
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(CheckpointError, match=r"checkpoints: step 3 cannot be written"):
        DirectoryCheckpoints(tmp_path / "checkpoints").save(3, STATE, FACTS)


class Bomb:
    def __reduce__(self):
        return (open, ("/nonexistent/mmcl", "w"))


def test_no_pickle_is_ever_read(kept):
    (newest(kept) / "state.pt").write_bytes(pickle.dumps(Bomb()))
    assert kept.latest().step == 10
    weights = newest(kept) / "state.safetensors"
    weights.write_bytes(pickle.dumps(Bomb()))
    import hashlib

    rewrite(newest(kept), sha256={weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()})
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        kept.latest()


def test_no_pickle_is_ever_written(kept):
    names = {path.name for path in newest(kept).iterdir()}
    assert names == {"state.safetensors", "manifest.json"}
    save_file(kept.latest().state, newest(kept) / "again.safetensors")
    assert (newest(kept) / "again.safetensors").read_bytes() == (newest(kept) / "state.safetensors").read_bytes()


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        read_checkpoint(tmp_path / "nowhere")
