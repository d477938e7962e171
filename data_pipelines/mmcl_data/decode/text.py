"""Captions and facts: strict text, and the tokens of open_clip's own tokenizer.

Text that is not UTF-8 is refused rather than repaired: replacement characters would be learned. Limits keep a hostile
member from costing more than a normal one: byte-pair encoding takes seconds for a word of a megabyte, and JSON may
nest without end.
"""

import bisect
import html
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from jaxtyping import Int64
from torch import Tensor

from mmcl.errors import DataError
from mmcl.types import InputSpec
from mmcl_data.decode import MAX_BYTES
from mmcl_data.order import mix, uniform

if TYPE_CHECKING:
    from mmcl_data.decode.tokens import Tokenizer

MAX_WORD = 1000
"""Characters of one run of letters or of signs: the cost of encoding a word grows with its square."""
_CAPTION = 4
"""What a draw of this module is for, as in `augment`."""
_TAG = re.compile(r"<[A-Za-z/!?][^<>]{0,1000}>")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\ufeff\ufffd]")
_WORD = re.compile(r"[^\W\d_]+|(?:[^\w\s]|_)+")


def decode_caption(data: bytes, max_bytes: int = MAX_BYTES["text"]) -> str:
    """The caption in `data`, without surrounding white space.

    Raises:
        DataError: above `max_bytes`, not UTF-8 (names the byte), empty, or with a word above 1000 characters.
    """
    return check_caption(_utf8(data, max_bytes, "the caption"))


def check_caption(caption: str) -> str:
    """The caption without surrounding white space.

    Raises:
        DataError: empty, or with a word above 1000 characters, also once entities and control characters are gone.
    """
    caption = caption.strip()
    if not caption:
        raise DataError("the caption is empty")
    if len(caption) > MAX_WORD and (longest := _longest_word(caption)) > MAX_WORD:
        raise DataError(f"the caption holds a word of {longest} characters, over the limit of {MAX_WORD}")
    return caption


def _longest_word(caption: str) -> int:
    """Characters of the longest word that the tokenizer will see, which mends and unescapes captions first."""
    import ftfy

    try:
        seen = html.unescape(html.unescape(ftfy.fix_text(caption)))
    except ValueError as error:  # what the tokenizer would end in too
        raise DataError("the caption names a character by a number of thousands of digits") from error
    return max((len(word) for word in _WORD.findall(seen)), default=0)


def pick_caption(caption: str | None, facts: Mapping[str, Any], weights: Mapping[str, float], seed: int) -> str:
    """One of the captions that a sample has, by the weights of their fields and the sample's seed.

    Args:
        caption: the txt member, under the name `txt`.
        facts: the json member; a field holds a caption or a list of them, of which one is drawn.
        weights: of fields.
        seed: of the sample.

    Raises:
        DataError: it has none of these fields, or one that is no caption.
    """
    held = facts if caption is None else {**facts, "txt": caption}
    there = [name for name in weights if held.get(name)]
    if not there:
        raise DataError(f"none of the fields that may hold a caption: {', '.join(weights)}")
    draws = uniform(mix(seed, _CAPTION), 2)
    place = bisect.bisect_right(
        list(itertools.accumulate(weights[name] for name in there)), draws[0] * _total(weights, there)
    )
    found = held[there[min(place, len(there) - 1)]]
    if isinstance(found, list) and found:
        found = found[int(draws[1] * len(found))]
    if not isinstance(found, str):
        raise DataError(
            f"the field {there[min(place, len(there) - 1)]!r} holds a {type(found).__name__}, not a caption"
        )
    return check_caption(found)


def _total(weights: Mapping[str, float], names: Sequence[str]) -> float:
    return sum(weights[name] for name in names)


def clean_caption(caption: str) -> str:
    """Without HTML tags and entities, control characters and mojibake, white space made single.

    Raises:
        DataError: nothing is left.
    """
    import ftfy

    text = ftfy.fix_text(html.unescape(html.unescape(_TAG.sub(" ", caption))))
    text = " ".join(_CONTROL.sub(" ", _TAG.sub(" ", text)).split())
    if not text:
        raise DataError("nothing of the caption is left once it is cleaned")
    return text


def decode_facts(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        DataError: above 1 MB, not UTF-8, not JSON, not an object, or with a number that is NaN or infinite.
    """
    text = _utf8(data, MAX_BYTES["facts"], "the json member")
    try:
        facts = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the json member is no JSON: {error}") from error
    if not isinstance(facts, dict):
        raise DataError(f"the json member holds a {type(facts).__name__}, not an object")
    return facts


def decode_class(data: bytes) -> int:
    """The class number in `data`.

    Raises:
        DataError: anything but up to 18 ASCII digits.
    """
    if not re.fullmatch(rb"\s*[0-9]{1,18}\s*", data[:40]) or len(data) > 40:
        raise DataError(f"a class is a number in ASCII digits, not {data[:20]!r}")
    return int(data)


def tokenize(captions: Sequence[str], spec: InputSpec) -> Int64[Tensor, "n l"]:
    """Token numbers of `captions`, (len(captions), spec.context_length): start, words, end, zeros.

    A longer caption is cut and still ends with the end token. The first call imports open_clip, which takes seconds.
    """
    return _tokenizer()(captions, spec.context_length)


@cache
def _tokenizer() -> "Tokenizer":
    from mmcl_data.decode.tokens import Tokenizer

    return Tokenizer()


def _utf8(data: bytes, limit: int, what: str) -> str:
    if len(data) > limit:
        raise DataError(f"{what} of {len(data)} bytes is over the limit of {limit}")
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{what} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}") from error


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"the number {number} is not finite")
    return value
