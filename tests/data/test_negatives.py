"""Negatives are wrong and well formed, the same for the same seed, and leave alone what is not their point."""

import json
from importlib.util import find_spec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from negative_cases import made_captions, world_captions

from mmcl.errors import ConfigError, DataError, MissingExtra
from mmcl_data.build.world import true_captions
from mmcl_data.negatives import OPERATORS, NegativesConfig, load_pools, mine_pools, negatives_of
from mmcl_data.negatives.edits import apply, article, exchanged, meaning_key, replaced
from mmcl_data.negatives.lexicon import load_lexicon
from mmcl_data.negatives.operators import Draws
from mmcl_data.negatives.parsing import Parser, spacy_tagger
from mmcl_data.negatives.shuffles import ORDER_TEST, SHUFFLES, clean, shuffled

LEXICON = load_lexicon()
MADE = made_captions(800)
EVERY = NegativesConfig(operators=dict.fromkeys(OPERATORS, 1.0), per_caption=len(OPERATORS), rounds=3)


def unknown(words):
    return ["X"] * len(words)


def parse(text, **tags):
    return Parser(LEXICON, tags)(text)


def proposals(name, text, corpus=(), tries=60):
    """All that a rule says of a caption."""
    pools = mine_pools([text, *corpus], unknown)
    made = [OPERATORS[name](pools.parser(text), Draws(seed), pools) for seed in range(tries)]
    return {proposal.text for proposal in made if proposal}


@pytest.fixture(scope="module")
def pools():
    return mine_pools(MADE, unknown)


@pytest.mark.parametrize(
    ("name", "text", "corpus", "expected"),
    [
        ("replace_obj", "A dog on a bench.", ["an elephant"], {"An elephant on a bench."}),
        ("replace_att", "Two RED cars", ["orange cars, three"], {"Two ORANGE cars", "Three RED cars"}),
        ("replace_rel", "a cup left of a box", ["a box right of a cup"], {"a cup right of a box"}),
        ("replace_rel", "A man sits on a bed", ["a man stands"], {"A man stands on a bed"}),
        ("swap_obj", "The dog chases  an old cat.", [], {"An old cat chases  the dog."}),
        ("swap_att", "A red cup, an orange box", [], {"An orange cup, a red box"}),
        ("add_obj", "a cup and a bowl", ["a vase"], {"a vase"}),
        ("add_obj", "a bowl", ["a vase"], {"a bowl and a vase"}),
        ("add_att", "a red and white car", ["a blue car"], {"a blue car"}),
        ("add_att", "a red car", ["a blue car"], {"a red and blue car"}),
        ("order_swap", "a dog barks after a cat meows", ["x after y", "a before a cat meows"], None),
        ("order_swap", "A dog barks, then a cat meows.", [], {"A cat meows, then a dog barks."}),
        ("swap_noun_phrases", "a red cup on an old box", [], {"an old box on a red cup"}),
        ("swap_verb_phrases", "a dog barks while a man talks", [], {"a dog talks while a man barks"}),
        ("swap_nouns", "an old cup on a box", [], {"an old box on a cup"}),
        ("swap_plurals", "two cups on three boxes", [], {"two boxes on three cups"}),
        ("swap_adverbs", "a dog barks loudly, a man talks slowly", [], {"a dog barks slowly, a man talks loudly"}),
        ("swap_adjectives", "an old cup on a red box", [], {"a red cup on an old box"}),
    ],
)
def test_a_rule_says_this_and_nothing_else(name, text, corpus, expected):
    expected = expected or {"a dog barks before a cat meows", "a cat meows after a dog barks"}
    assert proposals(name, text, corpus) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("swap_obj", "a cat and a dog"),
        ("swap_obj", "a cat sleeps next to a dog"),
        ("swap_obj", "a cat sleeps beside a dog"),
        ("swap_obj", "a boy talks to a man"),
        ("swap_obj", "a peacock (a bird)"),
        ("swap_obj", "a cat chases his dog"),
        ("swap_obj", "a cat chases two dogs"),
        ("swap_att", "a red cup and a blue cup"),
        ("swap_att", "a grey cup on a gray box"),
        ("swap_nouns", "a cup of a box"),
        ("swap_adverbs", "slowly and quietly"),
        ("swap_verb_phrases", "a dog barks and growls"),
        ("replace_obj", "a group of people"),
        ("replace_rel", "a cup stands on a box"),
        ("replace_rel", "a man picks it up close to the window"),
        ("order_swap", "a dog barks, then it growls"),
        ("order_swap", "a dog barks, then growls"),
    ],
)
def test_what_may_still_be_true_is_not_said(name, text):
    assert proposals(name, text, ["a man sits", "a bird on top of a vase"]) == set()


def test_synonyms_and_general_names_do_not_replace_each_other():
    corpus = ["a puppy, an animal, a gray car, a vehicle, a girl, a woman and a child"]
    assert proposals("replace_obj", "a dog", corpus) == set()
    assert proposals("replace_att", "a grey car", corpus) == set()
    assert proposals("replace_obj", "a girl", corpus) == set()
    assert proposals("replace_obj", "a bus", corpus) == {"a car"}


def test_a_noun_nobody_knows_is_replaced_where_the_corpus_has_its_neighbours():
    corpus = ["a man at a harbour", "a man by a cliff"]
    tags = {"harbour": "NN", "cliff": "NN", "market": "NN"}
    pools = mine_pools(["a man at a market", *corpus], lambda words: [tags.get(word, "X") for word in words])
    caption = pools.parser("a man at a market")
    made = {p.text for seed in range(60) if (p := OPERATORS["replace_obj"](caption, Draws(seed), pools))}
    assert made == {"a man at a harbour"}


def test_what_is_not_changed_stays_as_it_is_written():
    caption = parse("An  old CAT (grey) saw an apple ; it ran.", saw="VBD")
    place = caption.words.index("apple")
    assert apply(caption, [replaced(caption, place, place + 1, "pear")]) == "An  old CAT (grey) saw a pear ; it ran."
    assert apply(caption, [replaced(caption, 2, 3, "dog")]) == "An  old DOG (grey) saw an apple ; it ran."
    assert apply(caption, [replaced(caption, 1, 2, "young")]) == "A  young CAT (grey) saw an apple ; it ran."


def test_capitals_begin_sentences_and_names_keep_theirs():
    caption = parse("A cat meets Tux", Tux="NNP", tux="NNP")
    assert exchanged(caption, (0, 2), (3, 4)) == "Tux meets a cat"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        *((word, "an") for word in ("apple", "hour", "umbrella", "Owl", "unimportant")),
        *((word, "a") for word in ("unicorn", "uniform", "one", "horse", "European", "ukulele", "used")),
    ],
)
def test_articles_follow_the_sound(word, expected):
    assert article(word) == expected


def test_paraphrases_have_one_key():
    assert meaning_key("A cat and the dog.") == meaning_key("the DOG, a cat")
    assert meaning_key("a cat while a dog") != meaning_key("a cat before a dog")


@given(st.integers(0, 2**64), st.integers(0, 799))
@settings(max_examples=60, deadline=None)
def test_the_same_arguments_give_the_same_negatives_all_different(pools, seed, number):
    caption = MADE[number]
    made = negatives_of(caption, pools, EVERY, seed)
    assert made == negatives_of(caption, pools, EVERY, seed)
    keys = {meaning_key(text) for text in (caption, *(negative.text for negative in made))}
    assert len(keys) == len(made) + 1


def test_other_seeds_give_other_negatives(pools):
    made = {tuple(negatives_of("A white dog runs near a red car.", pools, EVERY, seed)) for seed in range(20)}
    assert len(made) > 15


def test_captions_of_the_same_sample_are_never_said(pools):
    caption, config = "A white dog runs near a red car.", NegativesConfig(per_caption=4)
    made = {n.text for seed in range(30) for n in negatives_of(caption, pools, config, seed)}
    others = set(list(made)[: len(made) // 2])
    again = {n.text for seed in range(30) for n in negatives_of(caption, pools, config, seed, others)}
    assert others
    assert again.isdisjoint(others)


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_text_has_negatives_or_none(pools, text):
    for negative in negatives_of(text, pools, EVERY, 0):
        assert negative.text != text


def test_long_captions_have_none_and_no_negative_is_longer(pools):
    caption = "A white dog runs near a red car."
    short = NegativesConfig(max_characters=len(caption), per_caption=6, rounds=9)
    made = [n.text for seed in range(40) for n in negatives_of(caption, pools, short, seed)]
    assert made
    assert max(map(len, made)) <= len(caption)
    assert negatives_of(caption, pools, NegativesConfig(max_characters=31), 0) == []


@pytest.mark.parametrize("max_objects", [2, 3])
def test_no_negative_is_true_of_the_scene_or_sound_whatever_the_rule(max_objects):
    world, captions = world_captions(3000, max_objects)
    pools, asked, wrong = mine_pools([c for _, c in captions], unknown), 0, []
    for number, (subject, caption) in enumerate(captions):
        true = true_captions(subject, world.config)
        parsed = pools.parser(caption)
        for place, name in enumerate(OPERATORS):  # before any test by frequency: every proposal must be wrong
            proposal = OPERATORS[name](parsed, Draws(number * 100 + place), pools)
            if proposal and meaning_key(proposal.text) != meaning_key(caption):
                asked += 1
                wrong += [(name, caption, proposal.text)] if proposal.text in true else []
    assert asked > 8000
    assert wrong == []


def test_no_word_of_a_kind_has_two_senses_and_opposites_are_both_ways():
    for kinds in (LEXICON.data["attributes"], LEXICON.data["nouns"], LEXICON.data["verbs"]):
        words = [word for senses in kinds.values() for sense in senses for word in sense.split()]
        assert sorted(words) == sorted(set(words))
    for kinds in (LEXICON.data["relations"], LEXICON.data["times"]):
        phrases = [phrase for senses in kinds.values() for sense in senses for phrase in sense.split("|")]
        assert sorted(phrases) == sorted(set(phrases))
        assert all(len(senses) > 1 for senses in kinds.values())
    assert set(LEXICON.attested) <= set(LEXICON.data["attributes"])
    assert set(LEXICON.animate | LEXICON.places) <= set(LEXICON.data["nouns"])
    for noun in LEXICON.data["hypernyms"]:
        assert noun in LEXICON.nouns
    for noun in LEXICON.nouns:
        assert LEXICON.overlap(noun, noun)
        assert all(LEXICON.overlap(noun, o) == LEXICON.overlap(o, noun) for o in ("dog", "person", "bird", "cars"))


def test_words_of_the_lexicon_are_inflected():
    assert [LEXICON.plural(noun) for noun in ("bus", "baby", "man", "snowman", "boy", "tomato")] == [
        "buses", "babies", "men", "snowmen", "boys", "tomatoes",
    ]  # fmt: skip
    forms = {word for word, entry in LEXICON.verbs.items() if entry[:2] == LEXICON.verbs["run"][:2]}
    assert {"runs", "running", "ran", "jogging", "raced", "races"} <= forms
    assert LEXICON.verbs["running"].form == "VBG"


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("two rings", "CD NNS"),
        ("a phone rings", "DT NN VBZ"),
        ("bells ring", "NNS VBP"),
        ("a red ring", "DT JJ NN"),
        ("an orange on an orange box", "DT NN IN DT JJ NN"),
        ("a dog jumps", "DT NN VBZ"),
        ("people are sailing", "NNS VBP VBG"),
    ],
)
def test_neighbours_settle_what_a_word_is(text, tags):
    assert list(parse(text, people="NNS", sailing="NN").tags) == tags.split()


def test_pools_are_the_same_in_any_order_and_through_a_file(tmp_path):
    captions = made_captions(200)
    mine_pools(captions, unknown).save(tmp_path / "a.json")
    mine_pools(reversed(captions), unknown).save(tmp_path / "b.json")
    load_pools(tmp_path / "a.json").save(tmp_path / "c.json")
    assert (
        (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes() == (tmp_path / "c.json").read_bytes()
    )
    config, loaded = NegativesConfig(per_caption=3), load_pools(tmp_path / "a.json")
    mined = mine_pools(captions, unknown)
    said = [[negatives_of(caption, pools, config, 1) for caption in captions] for pools in (loaded, mined)]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 0}, "expected format 1, lexicon .*, found format 0"),
        ({"lexicon": 0}, "mine it again"),
        ({"words": 3}, "no file of pools"),
        ({"pairs": {"a": 1}}, "no file of pools"),
        ({"pools": [1]}, "no file of pools"),
    ],
)
def test_a_file_that_is_no_pools_is_refused(tmp_path, change, message):
    file = tmp_path / "pools.json"
    mine_pools(["a red car"], unknown).save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=message):
        load_pools(file)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"operators": {"swap": 1.0}}, "swap.*choose from replace_obj"),
        ({"operators": {}}, "at least one"),
        ({"operators": {"swap_obj": 0.0}}, "weights above 0"),
        ({"per_caption": 0}, "per_caption=0"),
        ({"rounds": 0}, "rounds=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings_, message):
    with pytest.raises(ConfigError, match=message):
        NegativesConfig(**settings_)


def test_heavier_rules_come_first_more_often(pools):
    config = NegativesConfig(operators={"replace_obj": 1.0, "replace_att": 9.0})
    made = [n for seed in range(400) for n in negatives_of("A white dog runs near a red car.", pools, config, seed)]
    assert sum(negative.operator == "replace_att" for negative in made) > 2 * len(made) / 3


def test_shuffles_keep_their_words_and_differ(pools):
    caption = pools.parser("A white dog, runs near a big red car and a man!")
    made = shuffled(caption, 3, tuple(SHUFFLES))
    assert set(made) == set(SHUFFLES)
    true = clean("A white dog , runs near a big red car and a man !")
    assert len({true, *made.values()}) == 6
    for name in ORDER_TEST:
        assert sorted(made[name].split()) == sorted(true.split())
    assert made == shuffled(caption, 3, tuple(SHUFFLES)) != shuffled(caption, 4, tuple(SHUFFLES))
    words = made["shuffle_nouns_and_adjectives"].split()
    assert [words[place] for place in (0, 3, 4, 5, 6)] == ["a", ",", "runs", "near", "a"]
    assert shuffled(pools.parser("cat"), 0) == {}


@pytest.mark.skipif(find_spec("spacy") is not None, reason="spaCy is there")
def test_spacy_is_an_extra():
    with pytest.raises(MissingExtra, match=r"mmcl\[spacy\]"):
        spacy_tagger()


def test_a_model_of_spacy_that_is_not_installed_is_named():
    pytest.importorskip("spacy")
    with pytest.raises(ConfigError, match="no model 'absent'"):
        spacy_tagger("absent")


def test_a_pipeline_of_spacy_tags_the_words_it_is_given():
    spacy = pytest.importorskip("spacy")
    from mmcl_data.negatives.parsing import tagger_of

    pipeline = spacy.blank("en")
    rules = pipeline.add_pipe("attribute_ruler")
    rules.add([[{"LOWER": "wug"}]], {"TAG": "NN"})
    assert tagger_of(pipeline)(["a", "wug", "isn't"]) == ["X", "NN", "X"]
