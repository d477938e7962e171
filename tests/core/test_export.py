"""An export is the model: for mmcl, and for open_clip with its own preprocessing. What differs is never written."""

import io
import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mmcl.export
from mmcl.errors import ConfigError, ExportError
from mmcl.export import export_model, load_export
from mmcl.model import clip_config, input_spec
from mmcl.testing import fake_batch, tiny_config, tiny_model
from mmcl.types import MODALITIES
from mmcl_data.decode.image import decode_image
from mmcl_data.decode.text import tokenize

TINY = tiny_config().clip
CONFIGS = {"plain": TINY, "custom": {**TINY, "custom_text": True}, "not custom": {**TINY, "custom_text": False}}


def exported(tmp_path, **changes):
    model = tiny_model(3, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "log_scales" not in name:  # weights that a fresh model of the same seed does not have
                parameter.add_(0.01 * torch.randn_like(parameter))
    export_model(model, tmp_path / "export", {"step": 7})
    return model, tmp_path / "export"


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("one"))


@pytest.fixture
def copy(one, tmp_path):
    """An export to tamper with."""
    return shutil.copytree(one[1], tmp_path / "copy")


def test_it_comes_back_bit_for_bit(one):
    model, folder = one
    loaded, manifest = load_export(folder)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not loaded.training
    assert manifest["step"] == 7 and manifest["format"] == 1
    assert manifest["difference"].keys() == {
        "open_clip_image",
        "open_clip_text",
        "mmcl_image",
        "mmcl_text",
        "mmcl_audio",
    }
    batch = fake_batch(tiny_config(), {name: [True] * 3 for name in MODALITIES})
    with torch.no_grad():
        assert all(torch.equal(value, loaded(batch.values)[name]) for name, value in model(batch.values).items())


def test_nothing_but_the_five_files_is_left(one):
    folder = one[1]
    names = {"mmcl.json", "mmcl_config.json", "mmcl_model.safetensors"}
    assert {p.name for p in folder.iterdir()} == names | {"open_clip_config.json", "open_clip_model.safetensors"}
    assert [p.name for p in folder.parent.iterdir()] == ["export"]
    assert json.loads((folder / "mmcl.json").read_text())["sha256"].keys() == {p.name for p in folder.iterdir()} - {
        "mmcl.json"
    }


def png(width: int, height: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BILINEAR).save(buffer, "PNG")
    return buffer.getvalue()


CAPTIONS = ["a red circle left of a blue square", "", "Käse-Fondue, s'il vous plaît! 🎺", "a bell " * 100]


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("clip", CONFIGS.values(), ids=CONFIGS)
def test_open_clip_gives_the_same_embeddings_through_its_own_preprocessing(tmp_path, clip, resize_mode):
    model, folder = exported(tmp_path, clip=clip, resize_mode=resize_mode, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    spec = input_spec(model.config)
    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    files = [png(101, 67, 0), png(45, 133, 1), png(33, 31, 2), png(20, 64, 3), png(32, 32, 4)]
    values = spec.nothing() | {
        "image": torch.stack([decode_image(data, spec) for data in files]),
        "text": tokenize(CAPTIONS, spec),
    }
    images = torch.stack([preprocess(Image.open(io.BytesIO(data))) for data in files])
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    model.eval()
    theirs.eval()
    with torch.no_grad():
        ours = model(values)
        image, text = theirs.encode_image(images, normalize=True), theirs.encode_text(tokens, normalize=True)
    assert torch.equal(tokens, values["text"])
    assert (image - ours["image"]).abs().max() <= 1e-5
    assert (text - ours["text"]).abs().max() <= 1e-5
    assert (ours["image"][0] - ours["image"][1]).abs().max() > 1e-2, "images are told apart at all"
    assert theirs.logit_scale.shape == () and theirs.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_it_stands_alone_when_the_config_it_was_made_from_is_gone(tmp_path):
    path = tmp_path / "tower.json"
    path.write_text(json.dumps(TINY))
    model, folder = exported(tmp_path, clip=str(path))
    path.unlink()
    loaded, _ = load_export(folder)
    assert clip_config(loaded.config) == TINY
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_directory_that_exists_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"out exists.*not overwritten"):
        export_model(tiny_model(), tmp_path / "out", {})
    assert list((tmp_path / "out").iterdir()) == []


def test_what_an_interrupted_export_left_is_replaced(tmp_path):
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "junk").write_text("half")
    export_model(tiny_model(), tmp_path / "out", {})
    assert not (tmp_path / "out" / "junk").exists() and not (tmp_path / ".out.tmp").exists()


@pytest.mark.parametrize("part", ["open_clip", "mmcl"])
def test_an_export_that_does_not_match_is_refused_and_leaves_nothing(tmp_path, monkeypatch, part):
    def damaged(state, path, metadata=None):
        if path.name == f"{part}_model.safetensors":
            name = next(name for name in state if name.endswith("visual.proj"))
            state = {**state, name: state[name] + 0.01 * torch.randn_like(state[name])}
        save_file(state, path, metadata)

    monkeypatch.setattr(mmcl.export, "save_file", damaged)
    with pytest.raises(ExportError, match=rf"{part}_image: embeddings differ by .* allowed are 1e-05"):
        export_model(tiny_model(), tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []


def test_nan_weights_are_refused(tmp_path):
    model = tiny_model()
    torch.nn.init.constant_(model.towers["audio"].head[1].bias, float("nan"))
    with pytest.raises(ExportError, match="mmcl_audio: embeddings differ by nan"):
        export_model(model, tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_open_clip_does_not_load_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(mmcl.export, "open_clip_state", lambda state, config: {"visual.proj": torch.zeros(1)})
    with pytest.raises(ExportError, match="open_clip does not load what was written"):
        export_model(tiny_model(), tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mmcl_model.safetensors", "mmcl_config.json", "open_clip_model.safetensors"])
def test_a_tampered_file_is_refused_by_name(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ExportError, match=rf"{name}: its sha256 is not the one in mmcl.json"):
        load_export(copy)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"format": 1}',
        '{"format": 1, "sha256": []}',
        b"\xff",
        '{"format": 2, "sha256": {}}',
    ],
)
def test_a_manifest_that_is_none_is_refused(copy, manifest):
    (copy / "mmcl.json").write_bytes(manifest if isinstance(manifest, bytes) else manifest.encode())
    with pytest.raises(ExportError, match=r"copy.*(no mmcl export|format 2)"):
        load_export(copy)


@pytest.mark.parametrize("name", ["mmcl.json", "mmcl_model.safetensors", "open_clip_config.json"])
def test_a_missing_file_is_refused(copy, name):
    (copy / name).unlink()
    with pytest.raises(ExportError, match=name):
        load_export(copy)


def test_open_clip_reads_weights_of_plain_layout(one):
    keys = load_file(one[1] / "open_clip_model.safetensors").keys()
    assert "token_embedding.weight" in keys and "visual.proj" in keys and not any("audio" in key for key in keys)
