"""Benchmarks under encoders whose scores are known beforehand."""

import pytest
import torch
from eval_fakes import BROKEN, COLLAPSED, NAMES, ORACLE, RANDOM, FakeEncoder, batches_of, hashed

from mmcl.errors import ConfigError, DataError, NoUsableSamples
from mmcl_evals import Compositional, Retrieval, ZeroShot, run_suite, templates_for
from mmcl_evals.zeroshot import class_embeddings


def classification(rows=160, *, size=7, distinct=False, name="animals", **options):
    """Rows of eight classes; `distinct` gives each row a number of its own, so that a random encoder guesses anew."""
    labels = [i % 8 for i in range(rows)]
    numbers = [1000 + i for i in range(rows)] if distinct else labels
    facts = [{"label": label, "held_out": label == 3} for label in labels]
    return ZeroShot(
        name=name,
        modality=options.pop("modality", "image"),
        batches=batches_of(numbers, facts, size=size, **options),
        classnames=NAMES,
        templates=templates_for("image"),
    )


def retrieval(rows=60, *, pair="image_text", size=7, name="pairs", **options):
    return Retrieval(name=name, pair=pair, batches=batches_of(range(rows), size=size, **options))


def about(caption, foils, name="scene"):
    return {"captions": {name: caption}, "foils": {name: foils}}


def composition(rows=160, *, size=7, distinct=False, modality="image", name="foils"):
    numbers = [i % 8 for i in range(rows)]
    facts = []
    for i in range(rows):
        true, other = NAMES[i % 8], NAMES[(i + 1) % 8]
        mark = f"{i} " if distinct else ""  # without a known name a text is its hash
        texts = (
            (f"{mark}true", f"{mark}false", f"{mark}wrong") if distinct else (f"a {true}", f"a {other}", f"no {other}")
        )
        facts.append(about(texts[0], {"attribute": texts[1], "relation": texts[2]}))
    return Compositional(name=name, modality=modality, batches=batches_of(numbers, facts, size=size))


def suite(**options):
    return [classification(**options), retrieval(**options), composition(**options)]


def values(evaluator, encoder):
    return {metric: score.value for metric, score in evaluator.run(encoder)}


@pytest.mark.parametrize("make", [classification, retrieval, composition])
def test_an_encoder_that_knows_gets_all_right(make):
    assert set(values(make(), ORACLE).values()) == {1.0}


@pytest.mark.parametrize("encoder", [COLLAPSED, BROKEN], ids=["collapsed", "nan"])
@pytest.mark.parametrize("make", [classification, retrieval, composition])
def test_an_encoder_that_tells_nothing_apart_gets_nothing_right(make, encoder):
    assert set(values(make(), encoder).values()) == {0.0}


@pytest.mark.parametrize("make", [classification, composition])
def test_the_interval_of_an_encoder_that_guesses_holds_chance(make):
    scores = dict(make(rows=400, distinct=True).run(RANDOM))
    for metric, score in scores.items():
        assert score.low < score.chance < score.high, (metric, score)


def test_the_interval_of_guessed_retrieval_holds_chance():
    scores = dict(retrieval(rows=400).run(RANDOM))
    assert set(scores) == {f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    for metric, score in scores.items():
        assert score.low < score.chance < score.high, (metric, score)
    assert scores["image_to_text_r5"].chance == pytest.approx(5 / 400)


def test_results_do_not_depend_on_the_batch_size():
    found = [[r.metrics for r in run_suite(suite(size=size), RANDOM)] for size in (1, 7, 1000)]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("pair", ["image_text", "audio_text", "image_audio"])
def test_retrieval_names_its_figures_after_the_pair_and_the_direction(pair):
    x, y = pair.split("_")
    evaluator = retrieval(pair=pair, rows=9)
    assert list(values(evaluator, ORACLE)) == [f"{x}_to_{y}_r1", f"{x}_to_{y}_r5", f"{y}_to_{x}_r1", f"{y}_to_{x}_r5"]
    assert evaluator.main_metric == f"{x}_to_{y}_r1"


def test_only_rows_that_have_both_sides_are_retrieved():
    evaluator = retrieval(rows=30, lacking={"image": [0, 8, 29], "text": [1, *range(14, 21)]})
    scores = dict(evaluator.run(ORACLE))
    assert {score.n for score in scores.values()} == {30 - 11}
    assert {score.value for score in scores.values()} == {1.0}


@pytest.mark.parametrize("by", ["caption", "tokens"])
def test_equal_captions_count_as_right_both_ways(by):
    numbers = [0, 0, 1, 2, 3, 4]  # two images of one text: whichever is found is right
    facts = [{"caption": NAMES[x]} if by == "caption" else {} for x in numbers]
    scores = dict(Retrieval(name="pairs", pair="image_text", batches=batches_of(numbers, facts)).run(ORACLE))
    assert scores["image_to_text_r1"].value == scores["text_to_image_r1"].value == 1.0
    assert scores["text_to_image_r1"].chance == pytest.approx((2 * 2 / 6 + 4 * 1 / 6) / 6)


def test_images_and_sounds_are_right_only_with_their_own_partner():
    facts = [{"caption": "the same"}] * 4
    shifted = FakeEncoder(lambda modality, x: hashed((x + (modality == "audio")) % 4))
    evaluator = Retrieval(name="pairs", pair="image_audio", batches=batches_of(range(4), facts))
    assert values(evaluator, shifted)["image_to_audio_r1"] == 0.0
    assert values(evaluator, ORACLE)["image_to_audio_r1"] == 1.0


def test_retrieval_without_a_pair_says_what_is_missing():
    with pytest.raises(NoUsableSamples, match="none has image and text"):
        values(retrieval(modalities=["image", "audio"]), ORACLE)
    with pytest.raises(NoUsableSamples, match="two are needed"):
        values(retrieval(rows=1), ORACLE)


def test_only_what_a_benchmark_reads_is_embedded():
    seen = []

    class Recording(FakeEncoder):
        def embed(self, batch):
            seen.append({modality: len(value) for modality, value in batch.values.items()})
            return super().embed(batch)

    values(composition(rows=7), Recording(hashed))
    values(retrieval(rows=7, pair="audio_text"), Recording(hashed))
    assert seen == [{"image": 7, "text": 0, "audio": 0}, {"image": 0, "text": 7, "audio": 7}]


def test_held_out_classes_are_scored_apart():
    blind = FakeEncoder(lambda modality, x: hashed(x if (modality, x) != ("image", 3) else "unknown"))
    scores = dict(classification().run(blind))
    assert {metric: score.n for metric, score in scores.items()} == {"acc1": 160, "acc1_held_out": 20, "acc1_seen": 140}
    assert scores["acc1_seen"].value == 1.0 and scores["acc1_held_out"].value < 1.0


def test_sounds_are_classified_like_images_and_rows_without_one_are_left_out():
    scores = dict(classification(modality="audio", lacking={"audio": range(10)}).run(ORACLE))
    assert scores["acc1"].n == 150 and scores["acc1"].value == 1.0


def test_a_class_is_the_direction_of_the_mean_of_its_prompts():
    def encode(modality, x):
        return torch.tensor([1.0, 0.0]) if x == 1 else torch.tensor([0.0, 1.0])

    names = class_embeddings(FakeEncoder(encode), ["dog", "cat"], ["a {c}", "cat {c}", "{c} cat"])
    assert names[0].tolist() == pytest.approx([1 / 5**0.5, 2 / 5**0.5])  # cat at the end wins in one of three
    assert names[1].tolist() == [1.0, 0.0]


def test_labels_that_are_no_class_are_refused_with_the_row():
    evaluator = ZeroShot(
        name="animals",
        modality="image",
        batches=batches_of([0, 1], [{"label": 0}, {"label": 2}]),
        classnames=["dog", "cat"],
        templates=["{c}"],
    )
    with pytest.raises(DataError, match=r"0.tar#1: expected a fact 'label' from 0 to 1, found 2"):
        values(evaluator, ORACLE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classnames": ["dog", "dog"]}, "several times"),
        ({"classnames": ["dog"]}, "two or more"),
        ({"templates": ["a photo"]}, "every template needs {c}"),
        ({"templates": []}, "found none"),
        ({"batches": iter([])}, "only once"),
    ],
)
def test_a_benchmark_that_cannot_be_run_is_refused_when_it_is_made(change, message):
    options = {"batches": [], "classnames": ["dog", "cat"], "templates": ["{c}"], **change}
    with pytest.raises(ConfigError, match=message):
        ZeroShot(name="animals", modality="image", **options)


def test_the_prompts_that_ship_have_a_place_for_the_name():
    for modality in ("image", "audio"):
        prompts = templates_for(modality)
        assert len(prompts) >= 5 and all(prompt.count("{c}") == 1 for prompt in prompts)


def test_foils_of_a_joint_row_are_set_against_the_caption_of_what_the_modality_holds():
    joint = {
        "captions": {"scene": "a dog", "sound": "a cat"},
        "foils": {"scene": {"attribute": "a cat"}, "sound": {"attribute": "a dog", "order": "a hen"}},
    }
    batches = batches_of(
        [0, 1], [joint, joint]
    )  # an image of a dog in the first row, and a sound of a cat in the second
    for modality, kinds in (("image", {"attribute"}), ("audio", {"attribute", "order"})):
        scores = dict(Compositional(name="foils", modality=modality, batches=batches).run(ORACLE))
        assert {metric: score.n for metric, score in scores.items()} == dict.fromkeys(kinds, 2)
        assert scores["attribute"].value == 0.5  # the other row holds the other caption's thing


def test_a_foil_that_equals_its_caption_is_no_decision():
    facts = [about("a dog", {"attribute": "a cat", "order": "a dog"})]
    evaluator = Compositional(name="foils", modality="image", batches=batches_of([0], facts))
    assert values(evaluator, ORACLE) == {"attribute": 1.0}


def test_rows_without_foils_are_left_out_and_none_at_all_is_an_error():
    facts = [about("a dog", {"order": "a cat"}), {"caption": "a cat"}]
    assert (
        dict(Compositional(name="f", modality="image", batches=batches_of([0, 1], facts)).run(ORACLE))["order"].n == 1
    )
    with pytest.raises(NoUsableSamples, match="none has 'foils'"):
        values(Compositional(name="f", modality="image", batches=batches_of([0, 1])), ORACLE)
    with pytest.raises(DataError, match=r"no captions\.scene"):
        values(
            Compositional(name="f", modality="image", batches=batches_of([0], [{"foils": {"scene": {"order": "x"}}}])),
            ORACLE,
        )


def test_a_suite_tells_each_figure_as_it_is_known_and_keeps_the_order():
    told = []
    results = run_suite(suite(), ORACLE, lambda name, metric, score: told.append((name, metric, score.value)))
    assert [result.name for result in results] == ["animals", "pairs", "foils"]
    assert told == [(r.name, metric, s.value) for r in results for metric, s in r.metrics.items()]
    assert [(r.task, r.modality, r.main_metric) for r in results] == [
        ("zeroshot_classification", "image-text", "acc1"),
        ("zeroshot_retrieval", "image-text", "image_to_text_r1"),
        ("compositional", "image-text", "attribute"),
    ]
    assert all(result.seconds > 0 for result in results)


def test_two_benchmarks_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="names of benchmarks must differ"):
        run_suite([classification(), classification()], ORACLE)
