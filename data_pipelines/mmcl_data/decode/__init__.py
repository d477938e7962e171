"""From the bytes of one member to one tensor, within limits.

These tables are the only place that says which member of a sample is what. A member with any other extension is never
decoded: readers that choose a decoder by extension run pickles because a tar asked them to.
"""

from typing import Literal

Kind = Literal["image", "audio", "text", "facts", "class"]

IMAGE_EXTENSIONS: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
AUDIO_EXTENSIONS: tuple[str, ...] = ("flac", "wav", "ogg", "mp3")
TEXT_EXTENSIONS: tuple[str, ...] = ("txt",)
FACTS_EXTENSIONS: tuple[str, ...] = ("json",)
CLASS_EXTENSIONS: tuple[str, ...] = ("cls",)
"""Of labelled sets: an index in ASCII digits, which evaluations read."""

MAX_BYTES: dict[Kind, int] = {
    "image": 64 * 2**20,
    "audio": 256 * 2**20,
    "text": 2**16,
    "facts": 10**6,
    "class": 40,
}
"""Of a member; a larger one is not read at all."""

KIND_OF_EXTENSION: dict[str, Kind] = {
    **dict.fromkeys(IMAGE_EXTENSIONS, "image"),
    **dict.fromkeys(AUDIO_EXTENSIONS, "audio"),
    **dict.fromkeys(TEXT_EXTENSIONS, "text"),
    **dict.fromkeys(FACTS_EXTENSIONS, "facts"),
    **dict.fromkeys(CLASS_EXTENSIONS, "class"),
}
