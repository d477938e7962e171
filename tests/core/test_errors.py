"""The error tree in the docstring is the real one, and the public names are these."""

import importlib
import re

import pytest

from mmcl import errors


def drawn() -> dict[str, str]:
    """Parent of each class in the docstring's drawing."""
    found, parents = {}, []
    for line in errors.__doc__.splitlines():
        match = re.match(r"^ {4}((?:[│ ] {3}|[├└]── )*)([A-Z]\w+)\b", line)
        if match:
            depth = len(match[1]) // 4
            parents[depth:] = [match[2]]
            found[match[2]] = parents[depth - 1] if depth else "Exception"
    return found


def real() -> dict[str, str]:
    classes = {cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, Exception)}
    return {cls.__name__: cls.__bases__[0].__name__ for cls in classes}


def test_the_tree_in_the_docstring_is_the_real_one():
    assert drawn() == real()
    assert len(drawn()) > 10


def test_every_error_is_an_mmcl_error_and_says_what_it_is():
    for name in real():
        cls = getattr(errors, name)
        assert issubclass(cls, errors.MmclError) and cls.__doc__, name


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.MissingExtra, ImportError),
        (errors.ShardMissing, FileNotFoundError),
        (errors.NonFiniteLoss, ArithmeticError),
    ],
)
def test_errors_with_a_builtin_meaning_are_caught_by_it(error, builtin):
    assert issubclass(error, builtin)


def test_errors_carry_their_facts():
    damaged = errors.ShardDamaged("a.tar", 512, "cut off")
    assert (damaged.shard, damaged.offset, damaged.cause) == ("a.tar", 512, "cut off")
    assert str(damaged) == "a.tar: damaged at byte 512: cut off"
    rejected = errors.SampleRejected("a.tar", "000", "no image")
    assert (rejected.shard, rejected.key, rejected.cause) == ("a.tar", "000", "no image")
    assert str(errors.MissingExtra("p", "e", "it")) == "it needs the package 'p': pip install 'mmcl[e]'"


@pytest.mark.parametrize(
    ("package", "names"),
    [
        (
            "mmcl.losses",
            {
                "Estimates",
                "HardNegatives",
                "Positives",
                "dcl",
                "global_contrast",
                "hn_nce",
                "individual_contrast",
                "info_nce",
                "mix",
                "mixup",
                "modular",
                "multi_positive",
                "mv_dhel",
                "mv_info_nce",
                "sigmoid",
            },
        ),
        ("mmcl.towers", {"AudioConfig", "AudioTower", "ImageTower", "TextTower"}),
    ],
)
def test_public_names_change_on_purpose_only(package, names):
    module = importlib.import_module(package)
    own = {name for name, value in vars(module).items() if str(getattr(value, "__module__", "")).startswith(package)}
    assert own == names
