"""Three towers: unit vectors, only of what is there, with a gradient for everything, in open_clip's names."""

import json
import math

import open_clip
import pytest
import torch
from jaxtyping import TypeCheckError
from rank_cases import CPU, empty_batch, parameters_without_gradient
from safetensors.torch import save_file

from mmcl.dist import ONE_PROCESS
from mmcl.encoder import TowersEncoder
from mmcl.engine import PlainEngine
from mmcl.errors import ConfigError
from mmcl.model import (
    ModelConfig,
    ThreeTowers,
    clip_config,
    from_open_clip_state,
    input_spec,
    load_open_clip,
    open_clip_state,
    split_outputs,
)
from mmcl.objective import InfoNCEConfig, Objective, ObjectiveConfig
from mmcl.optim import OptimConfig
from mmcl.testing import fake_batch, tiny_config, tiny_model
from mmcl.towers import AudioConfig, AudioTower
from mmcl.train import train_step
from mmcl.types import MODALITIES, PAIRS

ALL = {name: [True] * 4 for name in MODALITIES}


def test_outputs_are_unit_vectors_in_fp32_and_scales_of_no_dimension():
    model = tiny_model()
    outputs = model(fake_batch(tiny_config(), ALL).values)
    assert outputs.keys() == {*MODALITIES, *PAIRS}
    for name in MODALITIES:
        assert outputs[name].shape == (4, 16) and outputs[name].dtype == torch.float32
        torch.testing.assert_close(outputs[name].norm(dim=-1), torch.ones(4), rtol=1e-5, atol=0)
    for pair in PAIRS:
        assert outputs[pair].shape == ()
        assert outputs[pair].item() == pytest.approx(1 / 0.07, rel=1e-6)


def test_towers_see_only_the_rows_that_have_what_they_read():
    model = tiny_model()
    seen = {}
    for name in MODALITIES:
        model.towers[name].register_forward_pre_hook(lambda _, args, name=name: seen.update({name: len(args[0])}))
    masks = {"image": [True] * 4, "text": [True, False, True, False], "audio": [False] * 4}
    batch = fake_batch(tiny_config(), masks)
    embeddings, _ = split_outputs(model(batch.values), batch)
    assert seen == {"image": 4, "text": 2, "audio": 1}, "one blank sound stands in for none"
    assert {name: len(value) for name, value in embeddings.values.items()} == {"image": 4, "text": 2, "audio": 0}
    assert embeddings.rows["text"].tolist() == [0, 2]
    x, y = embeddings.pair("image_text")
    assert torch.equal(x, embeddings.values["image"][[0, 2]]) and torch.equal(y, embeddings.values["text"])


def test_a_row_is_embedded_alike_whatever_else_the_batch_holds():
    model = tiny_model().eval()
    whole = model(fake_batch(tiny_config(), ALL).values)
    masks = {"image": [False, False, True, False], "text": [True] * 4, "audio": [True, False, False, True]}
    part = model(fake_batch(tiny_config(), masks).values)
    torch.testing.assert_close(part["image"], whole["image"][[2]], rtol=0, atol=1e-6)
    torch.testing.assert_close(part["audio"], whole["audio"][[0, 3]], rtol=0, atol=1e-6)


class Gradients(PlainEngine):
    def step(self, lr, *, watch=False):
        self.without = parameters_without_gradient(self.model)
        self.zero = [name for name, p in self.model.named_parameters() if p.grad is not None and not p.grad.any()]
        return torch.zeros(())


@pytest.mark.parametrize("lacking", MODALITIES)
def test_without_a_modality_every_parameter_still_has_a_gradient_and_its_tower_a_zero_one(lacking):
    engine = Gradients(tiny_model(), OptimConfig(), CPU, ONE_PROCESS)
    batch = fake_batch(tiny_config(), {**ALL, lacking: [False] * 4})
    train_step(engine, batch, Objective(ObjectiveConfig()), 0.0)
    assert engine.without == []
    tower = {name for name, _ in engine.model.named_parameters() if name.startswith(f"towers.{lacking}.")}
    assert tower and tower <= set(engine.zero)
    assert {f"log_scales.{pair}" for pair, sides in PAIRS.items() if lacking in sides} <= set(engine.zero)
    assert not {name for name in engine.zero if not name.startswith((f"towers.{lacking}.", "log_scales."))}


def test_a_batch_of_rejected_samples_costs_nothing_and_breaks_nothing():
    engine = Gradients(tiny_model(), OptimConfig(), CPU, ONE_PROCESS)
    values = train_step(engine, empty_batch(), Objective(ObjectiveConfig()), 0.0)
    assert values["loss"].item() == 0 and engine.without == []


def test_a_pair_without_weight_still_gives_its_scale_a_gradient():
    engine = Gradients(tiny_model(), OptimConfig(), CPU, ONE_PROCESS)
    train_step(
        engine,
        fake_batch(tiny_config(), ALL),
        Objective(ObjectiveConfig(info_nce=InfoNCEConfig(weights={"image_text": 1.0}))),
        0.0,
    )
    assert engine.without == [] and "log_scales.audio_text" in engine.zero


def test_images_of_the_wrong_type_are_refused_while_tests_run():
    model = tiny_model()
    with pytest.raises(TypeCheckError, match="parameter 'pixels'"):
        model.towers["image"](torch.zeros(2, 3, 32, 32))


def test_the_same_seed_gives_the_same_weights():
    first, second, other = tiny_model(3).state_dict(), tiny_model(3).state_dict(), tiny_model(4).state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


# --- precision ------------------------------------------------------------------------------------------------------


def test_in_bf16_the_mel_spectrogram_is_the_one_of_fp32():
    model = tiny_model()
    exact, low = {}, {}
    sounds = fake_batch(tiny_config(), ALL)
    for bf16, seen in ((False, exact), (True, low)):
        model.bf16 = bf16
        hooks = [
            model.towers["audio"].vit.patch_embed.register_forward_pre_hook(lambda _, a, s=seen: s.update(mel=a[0])),
            model.towers["audio"].vit.patch_embed.register_forward_hook(lambda _, __, o, s=seen: s.update(patches=o)),
        ]
        seen["outputs"] = model(sounds.values)
        for hook in hooks:
            hook.remove()
    assert low["mel"].dtype == torch.float32 and torch.equal(exact["mel"], low["mel"])
    assert low["patches"].dtype == torch.bfloat16, "and the tower itself is in bf16"
    for name in MODALITIES:
        assert low["outputs"][name].dtype == torch.float32
        torch.testing.assert_close(low["outputs"][name], exact["outputs"][name], rtol=0, atol=0.05)
        torch.testing.assert_close(low["outputs"][name].norm(dim=-1), torch.ones(4), rtol=1e-5, atol=0)


def test_the_spectrogram_has_the_shape_its_config_says_and_shows_a_tone_where_it_is():
    config = AudioConfig(clip_seconds=0.32, mels=32, width=32, layers=1, heads=2)
    tower = AudioTower(config, 8)
    seconds = torch.arange(config.clip_samples) / config.sample_rate
    low, high = (tower.features(torch.sin(2 * math.pi * hz * seconds)[None])[0, 0] for hz in (300.0, 6000.0))
    assert low.shape == (config.mels, config.frames) == (32, 32)
    assert low.mean(1).argmax() < 8 and high.mean(1).argmax() > 24
    silence = tower.features(torch.zeros(1, config.clip_samples))
    torch.testing.assert_close(silence, torch.full_like(silence, (math.log(1e-6) + 4.27) / 9.14))


# --- open_clip ------------------------------------------------------------------------------------------------------

TINY = tiny_config().clip
QUICK = {**TINY, "quick_gelu": True}
CONFIGS = {
    "plain CLIP": TINY,
    "custom text": {**TINY, "custom_text": True},
    "custom text: false": {**TINY, "custom_text": False},
    "quick gelu": QUICK,
}


def theirs(clip: dict) -> torch.nn.Module:
    """As open_clip's own factory builds it."""
    fields = dict(clip)
    return (open_clip.CustomTextCLIP if fields.pop("custom_text", False) else open_clip.CLIP)(**fields)


@pytest.mark.parametrize("clip", CONFIGS.values(), ids=CONFIGS)
def test_weights_go_to_open_clip_and_come_back_bit_for_bit(clip):
    config = tiny_config(clip=clip)
    torch.manual_seed(0)
    model, other = ThreeTowers(config).eval(), theirs(clip).eval()
    state = model.state_dict()
    other.load_state_dict(open_clip_state(state, config), strict=True)
    back = from_open_clip_state(other.state_dict())
    audio = {name for name in state if name.startswith(("towers.audio.", "log_scales.audio", "log_scales.image_audio"))}
    assert back.keys() == state.keys() - audio
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())

    batch = fake_batch(config, ALL).values
    pixels = (batch["image"].float() / 255 - model.towers["image"].mean) / model.towers["image"].std
    with torch.no_grad():
        outputs = model(batch)
        assert torch.equal(outputs["image"], other.encode_image(pixels, normalize=True))
        assert torch.equal(outputs["text"], other.encode_text(batch["text"], normalize=True))


@pytest.mark.parametrize("clip", CONFIGS.values(), ids=CONFIGS)
def test_weights_of_open_clip_load_into_three_towers(clip):
    torch.manual_seed(1)
    other, model = theirs(clip), ThreeTowers(tiny_config(clip=clip))
    found = model.load_state_dict(from_open_clip_state(other.state_dict()), strict=False)
    assert found.unexpected_keys == []
    assert all("audio" in name for name in found.missing_keys)
    again = open_clip_state(model.state_dict(), model.config)
    assert again.keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in other.state_dict().items())


def test_the_logit_scale_goes_over_without_its_dimension():
    model = tiny_model(init_scale=20.0)
    assert model.log_scales["image_text"].shape == (1,)
    assert open_clip_state(model.state_dict(), model.config)["logit_scale"].shape == ()
    assert open_clip_state(model.state_dict(), model.config)["logit_scale"].exp().item() == pytest.approx(20.0)


def test_a_run_can_start_from_the_weights_of_open_clip_and_only_from_weights_that_fit(tmp_path):
    torch.manual_seed(1)
    other, model, audio = theirs(TINY), tiny_model(), tiny_model().towers["audio"].state_dict()
    save_file(other.state_dict(), tmp_path / "open_clip_model.safetensors")
    load_open_clip(model, tmp_path)
    again = open_clip_state(model.state_dict(), model.config)
    assert all(torch.equal(tensor, again[name]) for name, tensor in other.state_dict().items())
    assert all(torch.equal(t, audio[n]) for n, t in model.towers["audio"].state_dict().items())
    load_open_clip(model, tmp_path / "open_clip_model.safetensors")
    short = {name: tensor for name, tensor in other.state_dict().items() if name != "ln_final.weight"}
    save_file(short, tmp_path / "short.safetensors")
    with pytest.raises(ConfigError, match=r"1 tensors do not fit .*, first towers\.text\.text\.ln_final\.weight"):
        load_open_clip(model, tmp_path / "short.safetensors")
    (tmp_path / "weights.pt").write_bytes(b"\x80\x04.")
    for nothing in ("weights.pt", "absent"):
        with pytest.raises(ConfigError, match="no open_clip weights in safetensors form"):
            load_open_clip(model, tmp_path / nothing)


@pytest.mark.parametrize(
    ("where", "field", "value"),
    [
        ("text_cfg", "hf_tokenizer_name", "t5-base"),
        ("text_cfg", "hf_model_name", "roberta-base"),
        ("text_cfg", "tokenizer_kwargs", {"strip_sep_token": True}),
        ("text_cfg", "vocab_size", 32000),
        ("", "init_logit_bias", -10),
    ],
)
def test_a_clip_config_that_would_train_something_else_than_it_says_is_refused(where, field, value):
    clip = json.loads(json.dumps(TINY))
    (clip[where] if where else clip)[field] = value
    with pytest.raises(ConfigError, match=f"{field}.* is not supported"):
        ThreeTowers(tiny_config(clip=clip))


def test_logit_biases_start_where_the_config_says_and_go_to_open_clip_and_back(tmp_path):
    model = tiny_model(init_bias=-10.0)
    outputs = model(fake_batch(tiny_config(), ALL).values)
    _, learned = split_outputs(outputs, fake_batch(tiny_config(), ALL))
    assert {pair: bias.item() for pair, bias in learned.biases.items()} == dict.fromkeys(PAIRS, -10.0)
    with torch.no_grad():
        model.biases["image_text"].fill_(-7.0)
    other = theirs(TINY | {"init_logit_bias": -1.0})
    state = open_clip_state(model.state_dict(), model.config)
    other.load_state_dict(state, strict=True)
    assert other.logit_bias.item() == -7
    save_file(other.state_dict(), tmp_path / "open_clip_model.safetensors")
    again = tiny_model(init_bias=-10.0)
    load_open_clip(again, tmp_path)
    assert again.biases["image_text"].item() == -7 and again.biases["audio_text"].item() == -10
    with pytest.raises(ConfigError, match=r"model\.init_bias, first biases\.image_text"):
        load_open_clip(tiny_model(), tmp_path)


def test_a_model_without_biases_has_none():
    outputs = tiny_model()(fake_batch(tiny_config(), ALL).values)
    assert not split_outputs(outputs, fake_batch(tiny_config(), ALL))[1].biases


@pytest.mark.slow
def test_a_built_in_name_builds_what_open_clip_builds():
    config = ModelConfig(clip="ViT-S-32-alt", audio=tiny_config().audio)
    model, other = ThreeTowers(config), open_clip.create_model("ViT-S-32-alt", load_weights=False)
    other.load_state_dict(open_clip_state(model.state_dict(), config), strict=True)
    assert input_spec(config).image_size == 224 and input_spec(config).context_length == 77


def test_a_config_may_be_a_json_file(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    assert clip_config(tiny_config(clip=str(path))) == TINY
    spec = input_spec(tiny_config(clip=str(path)))
    assert (spec.image_size, spec.context_length, spec.sample_rate, spec.clip_samples) == (32, 12, 16000, 5120)


def test_the_config_of_a_run_is_not_changed_by_building_it():
    config = tiny_config()
    before = json.dumps(config.clip)
    ThreeTowers(config)
    clip_config(config)["vision_cfg"]["width"] = 7
    assert json.dumps(config.clip) == before


# --- configs that cannot be built -----------------------------------------------------------------------------------


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("clip", "says"),
    [
        ("ViT-Z-99", "'ViT-Z-99' is no open_clip model.*list_models"),
        ("/nowhere/model.json", "nowhere.*cannot be read"),
        ({"embed_dim": 8}, r"lacks \['text_cfg', 'vision_cfg'\]"),
        ({**TINY, "text_cfg": {**TINY["text_cfg"], "breadth": 3}}, "open_clip cannot build it.*breadth"),
        ({**TINY, "text_cfg": {**TINY["text_cfg"], "heads": 5}}, "open_clip cannot build it"),
        ({**TINY, "depth": 3}, "open_clip cannot build it.*depth"),
    ],
)
def test_a_clip_config_that_cannot_be_built_is_refused(clip, says):
    with pytest.raises(ConfigError, match=says):
        ThreeTowers(tiny_config(clip=clip))


@pytest.mark.parametrize("text", ["{", "[]", "null", '"ViT-B-32"'])
def test_a_json_file_that_holds_no_config_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"model.clip=.*x.json"):
        clip_config(tiny_config(clip=write(tmp_path / "x.json", text)))


def test_images_that_are_not_square_are_refused():
    with pytest.raises(ConfigError, match="only square images"):
        input_spec(tiny_config(clip={**TINY, "vision_cfg": {**TINY["vision_cfg"], "image_size": [32, 48]}}))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"width": 30, "heads": 4}, "width=30 must be a multiple of heads=4"),
        ({"mels": 40}, "mels=40 must be a multiple of patch_size=16"),
        ({"mels": 0}, "mels=0"),
        ({"clip_seconds": 1.0}, r"frames \(clip_seconds / hop_ms\)=100 must be a multiple of patch_size=16"),
    ],
)
def test_an_audio_tower_that_cannot_be_built_is_refused(fields, says):
    with pytest.raises(ConfigError, match=says):
        AudioConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"resize_mode": "stretch"}, "stretch.*shortest"), ({"init_scale": 0.5}, "0.5"), ({"init_scale": 101}, "101")],
)
def test_a_model_config_out_of_range_is_refused(fields, says):
    with pytest.raises(ConfigError, match=says):
        ModelConfig(**fields)


# --- the encoder that evaluations see -------------------------------------------------------------------------------


def encoder(model: ThreeTowers, **more) -> TowersEncoder:
    spec = input_spec(model.config)
    tokenize = open_clip.SimpleTokenizer(context_length=spec.context_length)
    return TowersEncoder(model, spec, lambda texts: tokenize(list(texts)), device=CPU, **more)


def test_captions_are_embedded_alike_alone_and_in_batches():
    texts = [f"a picture of {n} bells" for n in range(7)]
    model = tiny_model()
    whole, parts = encoder(model).embed_texts(texts), encoder(model, captions_at_once=3).embed_texts(texts)
    assert whole.shape == (7, 16) and not whole.requires_grad
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_the_model_in_the_mode_it_was_in(training):
    model = tiny_model().train(training)
    seen = []
    model.towers["image"].register_forward_hook(lambda module, *_: seen.append(module.training))
    found = encoder(model).embed(fake_batch(tiny_config(), ALL))
    assert seen == [False] and model.training is training and not found.values["image"].requires_grad
