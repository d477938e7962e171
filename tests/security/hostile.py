"""A corpus of inputs that were made to do harm, by name: how each is made, what a user does with it, what that raises.

Nothing here is kept on disk: everything is written at run time into a folder of its own. `CANARY` is the file that an
input leaves where it got to run something.
"""

import contextlib
import gzip
import io
import json
import lzma
import os
import pickle
import random
import socket
import string
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from mmcl.types import InputSpec
from mmcl_data.blobs import Blobs
from mmcl_data.decode.text import tokenize
from mmcl_data.evalsets import EvalBatches
from mmcl_data.index import FOLDER, build_index
from mmcl_data.samples import decode_row, wanted
from mmcl_data.scan import read_sample, scan_shard
from mmcl_data.stream import DataConfig, ShardStream, SourceConfig
from mmcl_launch.config import load_config
from mmcl_launch.run import load_model

CANARY = "canary"
SPEC = InputSpec(image_size=224, resize_mode="shortest", sample_rate=16_000, clip_samples=160_000, context_length=77)
BLOCK = 512
Members = dict[str, bytes]


@dataclass(frozen=True)
class Hostile:
    """One input."""

    make: Callable[[Path], Any]
    """Writes it into a folder."""
    use: Callable[[Path], None]
    """What a user does with it there."""
    raises: str
    """Name of the error; empty where the input must go by without one."""
    says: str = ""
    """Part of its message."""


# --- good parts -----------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def sound(wave: Any, rate: int = 16_000, form: str = "WAV", subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=form, subtype=subtype)
    return out.getvalue()


def photo() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG")


def tone() -> bytes:
    return sound(np.sin(np.arange(16_000) / 9).astype(np.float32) / 2)


def good() -> Members:
    return {"jpg": photo(), "wav": tone(), "txt": b"a caption"}


class Evil:
    """What a pickle may be: unpickled, it makes the canary."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {CANARY}",)


EVIL = pickle.dumps(Evil())

# --- tars -----------------------------------------------------------------------------------------------------------


def header(name: bytes, size: bytes | int, kind: bytes = b"0", rest: bytes = b"") -> bytes:
    """A header block whose checksum holds, whatever it says."""
    digits = b"%011o\0" % size if isinstance(size, int) else size
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + digits.ljust(12, b"\0") + b"00000000000\0"
    block = (block + b" " * 8 + kind + bytes(100) + b"ustar\x0000" + rest).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def member(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, len(data), kind) + padded(data)


def pax(**fields: str) -> bytes:
    """A PAX header for the member that follows."""
    lines = b""
    for key, value in fields.items():
        line = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(line) + 1
        while len(str(length)) + len(line) != length:
            length = len(str(length)) + len(line)
        lines += str(length).encode() + line
    return member(b"pax", lines, b"x")


def closed(*parts: bytes) -> bytes:
    whole = b"".join(parts) + bytes(2 * BLOCK)
    return whole + bytes(-len(whole) % 10_240)


def shard(folder: Path, content: bytes) -> None:
    (folder / "shards").mkdir()
    (folder / "shards" / "000000.tar").write_bytes(content)


def whole(members: Mapping[str, bytes], key: str = "k") -> bytes:
    return closed(*(member(f"{key}.{extension}".encode(), data) for extension, data in members.items()))


def tar_with(*parts: bytes) -> Callable[[Path], None]:
    """A good sample, then these parts."""
    return lambda folder: shard(folder, closed(*(member(f"a.{x}".encode(), d) for x, d in good().items()), *parts))


def sample_with(**changes: bytes | Callable[[], bytes]) -> Callable[[Path], None]:
    """One sample, good but for some members."""

    def make(folder: Path) -> None:
        made = {name: data() if callable(data) else data for name, data in changes.items()}
        shard(folder, whole(good() | made))

    return make


def alone(**members: bytes) -> Callable[[Path], None]:
    return lambda folder: shard(folder, whole(members))


def written(name: str, content: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda folder: shard(folder, content())


# --- what users do --------------------------------------------------------------------------------------------------


def stream_of(folder: Path, shards: str, **source: Any) -> None:
    config = DataConfig(sources={"a": SourceConfig(shards=shards, **source)}, max_bad_share=0.0)
    made = ShardStream(config, SPEC, 1, 0, quarantine=folder / "quarantine.jsonl")
    for batch in islice(made.batches(), 3):
        assert batch.size == 1


def train(folder: Path) -> None:
    """Train on the shards in a folder."""
    stream_of(folder, str(folder / "shards"))


def train_on_facts(folder: Path) -> None:
    """Likewise, with captions from the json member."""
    stream_of(folder, str(folder / "shards"), captions={"alt": 1.0})


def evaluate(folder: Path) -> None:
    """Read the first sample as an evaluation does."""
    path = str(folder / "shards" / "000000.tar")
    entry = scan_shard(path).samples[0]
    members = read_sample(Blobs(), path, wanted(path, entry, facts=True))
    row = decode_row(path, entry.key, members, SPEC, start=0.5, with_facts=True)
    tokenize([row.caption or ""], SPEC)


def train_and_evaluate(folder: Path) -> None:
    """Both decoders: what the first refuses the second must refuse as well."""
    held = EvalBatches(str(folder / "shards"), SPEC)
    assert list(held) == [] and held.skipped == 1
    train(folder)


def train_on(shards: str) -> Callable[[Path], None]:
    return lambda folder: stream_of(folder, shards)


def train_with_index(folder: Path) -> None:
    stream_of(folder, str(folder / "shards"), index=str(folder / "index"))


def use_model(folder: Path) -> None:
    load_model(folder / "model")


def read_config(folder: Path) -> None:
    load_config([str(folder / "run.yaml")])


# --- images ---------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *extra: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(min(10**6, (3 * width + 1) * height))))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + rows + chunk(b"IEND", b"")


def text_bomb(kind: bytes) -> bytes:
    packed = zlib.compress(bytes(200 * 2**20), 9)
    lead = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}[kind]
    return png_of(32, 32, *(chunk(kind, lead + packed) for _ in range(3)))


def apng(frames: int) -> bytes:
    control = chunk(b"acTL", struct.pack(">II", frames, 0))
    return png_of(32, 32, control)


def webp(frames: int) -> bytes:
    still = encoded(Image.new("RGB", (8, 8)), "WEBP")[12:]
    frame = struct.pack("<I", 0)[:3] * 2 + struct.pack("<I", 7)[:3] * 2 + struct.pack("<I", 10)[:3] + b"\0" + still
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + struct.pack("<I", 7)[:3] * 2
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += (b"ANMF" + struct.pack("<I", len(frame)) + frame) * frames
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_canvas() -> bytes:
    """A canvas of the largest size there is, around a tiny picture."""
    still = encoded(Image.new("RGB", (8, 8)), "WEBP")[12:]
    frame = struct.pack("<I", 0)[:3] * 2 + struct.pack("<I", 7)[:3] * 2 + struct.pack("<I", 10)[:3] + b"\0" + still
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + struct.pack("<I", 16382)[:3] * 2
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def lying_jpeg() -> bytes:
    """A frame header that says 8000 x 7999 over the data of 64 x 64 pixels."""
    data = bytearray(photo())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 7999, 8000)
    return bytes(data[: len(data) * 2 // 3])


def scans_jpeg() -> bytes:
    """A progressive JPEG of 20 megapixels that goes over them once for each of thousands of empty scans."""
    data = encoded(Image.new("L", (4096, 4096)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    return data[:-2] + scan * 4000 + b"\xff\xd9"


def gif() -> bytes:
    frames = [Image.new("L", (8, 8), shade % 256) for shade in range(50)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def fits() -> bytes:
    cards = ["SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 50000", "NAXIS2  = 50000", "END"]
    return "".join(card.ljust(80) for card in cards).encode().ljust(2880, b" ")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(touch canary) (w) file\nshowpage\n"
SVG = b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg xmlns="x">&a;</svg>'
HDF5 = b"\x89HDF\r\n\x1a\n" + bytes(600)
PSD = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 4, 30_000, 30_000, 8, 3) + bytes(100)


# --- sounds ---------------------------------------------------------------------------------------------------------


def wav_header(*, channels: int = 1, rate: int = 16_000, frames: int = 16_000, held: int = 16_000) -> bytes:
    step = 2 * channels
    size = frames * step & 0xFFFFFFFF
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * step & 0xFFFFFFFF, step & 0xFFFF, 16)
    body = b"WAVE" + head + b"data" + struct.pack("<I", size) + b"\1\2" * held
    return b"RIFF" + struct.pack("<I", 0xFFFFFFFF) + body


def lying_flac() -> bytes:
    data = bytearray(sound(np.sin(np.arange(16_000) / 9), form="FLAC"))
    data[21] |= 0x0F  # the 36 bits of the number of samples in STREAMINFO
    data[22:26] = b"\xff" * 4
    return bytes(data)


def flac_channels() -> bytes:
    """STREAMINFO of 8 channels at 655,350 Hz over the frames of one channel."""
    data = bytearray(sound(np.sin(np.arange(16_000) / 9), form="FLAC"))
    data[18:21] = (655_350 << 4 | 7 << 1 | 1).to_bytes(3, "big")
    return bytes(data)


def ogg_chain() -> bytes:
    """Thousands of streams one after another, each of one sample."""
    return sound(np.full(1, 0.5), form="OGG") * 3000


def giant_id3() -> bytes:
    size = 200 * 2**20
    syncsafe = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\4\0\0" + syncsafe + bytes(2**20) + sound(np.sin(np.arange(16_000) / 9), form="MP3")


# --- captions and facts ---------------------------------------------------------------------------------------------


def letters(count: int, between: str = "") -> bytes:
    """A word that byte-pair encoding has no short cut for, with something between its letters."""
    draw = random.Random(0)
    return between.join(draw.choice(string.ascii_lowercase) for _ in range(count)).encode()


def entities(count: int) -> bytes:
    """The same word told by numbers, so that it is one only once it was unescaped."""
    return b"".join(b"&#%d;" % letter for letter in letters(count))


def facts(text: str) -> Callable[[Path], None]:
    return sample_with(json=text.encode())


# --- indices --------------------------------------------------------------------------------------------------------


def indexed(change: Callable[[Path], None], beside: bool = False) -> Callable[[Path], None]:
    """Good shards whose good index was changed; beside them, or in a folder of its own."""

    def make(folder: Path) -> None:
        shard(folder, closed(*(member(f"{k}.{x}".encode(), d) for k in "abc" for x, d in good().items())))
        where = folder / "shards" / FOLDER if beside else folder / "index"
        build_index(str(folder / "shards"), where)
        change(where)

    return make


def manifest(**changes: Any) -> Callable[[Path], None]:
    def change(index: Path) -> None:
        known = json.loads((index / "index.json").read_text())
        known["shards"][0] |= {name: value for name, value in changes.items() if name in known["shards"][0]}
        known |= {name: value for name, value in changes.items() if name in known}
        (index / "index.json").write_text(json.dumps(known))

    return change


def array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def act(index: Path) -> None:
        np.save(index / f"{name}.npy", change(np.load(index / f"{name}.npy")))

    return act


def objects(index: Path) -> None:
    np.save(index / "offsets.npy", np.array([Evil()] * 9, dtype=object), allow_pickle=True)


def elsewhere(index: Path) -> None:
    """Names a file beyond the shards, rightly described."""
    secret = index.parent / "secret"
    secret.write_bytes(b"a secret" * 4000)
    manifest(path=str(secret), bytes=secret.stat().st_size, stamp=str(secret.stat().st_mtime_ns))(index)


def only_part(index: Path) -> Path:
    (index / "index.json").unlink()
    (part,) = (index / "parts").glob("*.npz")
    return part


def pickled_part(index: Path) -> None:
    part = only_part(index)
    with np.load(part) as held:
        arrays = dict(held)
    np.savez(part, **(arrays | {"counts": np.array([Evil()], dtype=object)}))


def bomb_part(index: Path) -> None:
    part = only_part(index)
    with np.load(part) as held:
        arrays = dict(held)
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for name, value in arrays.items():
            out = io.BytesIO()
            np.save(out, value)
            packed.writestr(f"{name}.npy", out.getvalue())
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "<u8", "fortran_order": False, "shape": (75 * 10**6,)})
        packed.writestr("bomb.npy", head.getvalue() + bytes(6 * 10**8))


def poor_part(index: Path) -> None:
    part = only_part(index)
    with np.load(part) as held:
        arrays = dict(held)
    del arrays["counts"]
    np.savez(part, **arrays)


# --- models and configs ---------------------------------------------------------------------------------------------

CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


def export(weights: Callable[[], bytes], clip: Any = None, **changes: Any) -> Callable[[Path], None]:
    """An export directory whose manifest vouches for weights that are none."""

    def make(folder: Path) -> None:
        model = folder / "model"
        model.mkdir()
        (model / "mmcl_model.safetensors").write_bytes(weights())
        config = {"clip": clip or CLIP, "audio": {}, "mean": [0.5] * 3, "std": [0.5] * 3}
        (model / "mmcl_config.json").write_text(json.dumps(config))
        digests = {path.name: sha256(path.read_bytes()).hexdigest() for path in model.iterdir()}
        (model / "mmcl.json").write_text(json.dumps({"format": 1, "sha256": digests} | changes))

    return make


def saved_pickle() -> bytes:
    out = io.BytesIO()
    torch.save({"weight": Evil()}, out)
    return out.getvalue()


def tensors(head: Any, data: bytes = b"") -> Callable[[], bytes]:
    def make() -> bytes:
        text = json.dumps(head).encode() if not isinstance(head, bytes) else head
        return struct.pack("<Q", len(text)) + text + data

    return make


OVERLAPPING = {
    name: {"dtype": "F32", "shape": [4], "data_offsets": [start, start + 16]} for name, start in (("a", 0), ("b", 8))
}


def run_directory(yaml: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "model" / "checkpoints").mkdir(parents=True)
        (folder / "model" / "config.yaml").write_text(yaml)

    return make


def checkpoint(weights: Callable[[], bytes], **changes: Any) -> Callable[[Path], None]:
    """A run directory whose only checkpoint is hostile."""

    def make(folder: Path) -> None:
        clip = json.dumps(CLIP)
        run_directory(f"data: {{sources: {{a: {{shards: x}}}}}}\nmodel: {{clip: {clip}}}\n")(folder)
        step = folder / "model" / "checkpoints" / "step-000000001"
        step.mkdir()
        (step / "state.safetensors").write_bytes(weights())
        digest = sha256((step / "state.safetensors").read_bytes()).hexdigest()
        known = {"format": 1, "step": 1, "facts": {}, "sha256": {"state.safetensors": digest}}
        (step / "manifest.json").write_text(json.dumps(known | changes))

    return make


def config(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "run.yaml").write_text(text)


def laughs() -> str:
    levels = [f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}, z: *a{n - 1}}}" for n in range(1, 30)]
    return "\n".join(["a0: &a0 {x: 1}", *levels])


SOURCES = "data: {sources: {a: {shards: x}}}\n"


def nothing(folder: Path) -> None:
    pass


def zero_link(folder: Path) -> None:
    (folder / "shards").mkdir()
    (folder / "shards" / "000000.tar").symlink_to("/dev/zero")


def fifo(folder: Path) -> None:
    (folder / "shards").mkdir()
    os.mkfifo(folder / "shards" / "000000.tar")


def weights_link(folder: Path) -> None:
    export(lambda: b"")(folder)
    (folder / "model" / "mmcl_model.safetensors").unlink()
    (folder / "model" / "mmcl_model.safetensors").symlink_to("/dev/zero")


def checkpoint_link(folder: Path) -> None:
    checkpoint(lambda: b"")(folder)
    (file,) = (folder / "model" / "checkpoints").glob("*/state.safetensors")
    file.unlink()
    file.symlink_to("/dev/zero")


def huge_member(folder: Path) -> None:
    """A sound of 250 MB beside a caption: as large as a member may be."""
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "000000.tar", "w") as tar, open("/dev/zero", "rb") as zeros:
        for extension, data in (("jpg", photo()), ("txt", b"a caption")):
            info = tarfile.TarInfo(f"k.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("k.wav")
        info.size = 250 * 2**20
        tar.addfile(info, zeros)


def huge_unread(folder: Path) -> None:
    """Members that nothing reads, of 800 MB in all; holes on disk."""
    shard(folder, b"")
    with (folder / "shards" / "000000.tar").open("wb") as file:
        for extension, data in good().items():
            file.write(member(f"k.{extension}".encode(), data))
        for number in range(4):
            file.write(header(f"k.bin{number}".encode(), 200 * 2**20))
            file.seek(200 * 2**20, os.SEEK_CUR)
        file.write(bytes(2 * BLOCK))
        file.truncate(file.tell() + -file.tell() % 10_240)


SHELLS = [
    *("pipe:touch canary", " pipe:touch canary", "PIPE:touch canary |", "file:///etc/passwd", "gs://b/{0..9}.tar"),
    *("ftp://h/0.tar", "data:application/x-tar;base64,AAAA", "memory://0.tar", "ssh://h/touch canary", "ais://b/0.tar"),
    *("simplecache::https://h/0.tar", "github://a:b@main/0.tar", "zip://0.tar::https://h/x.zip", "s3:touch canary"),
]
"""Transports that some reader of shards knows, and that mmcl does not."""

DAMAGED = "ShardDamaged"
BAD = "TooManyBadSamples"

CORPUS: dict[str, Hostile] = {
    **{f"shards {spec!r}": Hostile(nothing, train_on(spec), "ConfigError", "only local paths") for spec in SHELLS[:3]},
    **{f"shards {spec!r}": Hostile(nothing, train_on(spec), "ConfigError", "shards") for spec in SHELLS[3:]},
    "a command in braces": Hostile(nothing, train_on("{pipe:touch canary,x.tar}"), "ShardMissing"),
    "shards without end": Hostile(nothing, train_on("{0..999}{0..999}{0..999}.tar"), "ConfigError", "more than"),
    "a name that is a command": Hostile(nothing, train_on("$(touch canary).tar; touch canary |"), "ShardMissing"),
    "a shard that is /dev/zero": Hostile(zero_link, train, DAMAGED, "not a regular file"),
    "a shard that is a FIFO": Hostile(fifo, train, DAMAGED, "not a regular file"),
    # tars
    "a pickle, pyd and pth and nothing else": Hostile(
        alone(pickle=EVIL, pkl=EVIL, pyd=EVIL, pth=saved_pickle(), npy=EVIL), train, "NoUsableSamples"
    ),
    "a pickle beside a good sample": Hostile(sample_with(pickle=EVIL, pyd=EVIL, pth=saved_pickle()), train, ""),
    "a pickle called jpg": Hostile(sample_with(jpg=EVIL), train_and_evaluate, BAD, "not a readable JPEG"),
    "a sparse member of GNU": Hostile(
        tar_with(header(b"b.txt", 512, b"S", b"\0" * 220), bytes(512)), train, DAMAGED, "a sparse file"
    ),
    "a sparse member of PAX": Hostile(
        tar_with(pax(GNU__sparse__major="1", GNU__sparse__realsize=str(2**36)), member(b"b.txt", b"1\n0\n")),
        train,
        DAMAGED,
        "a sparse file",
    ),
    "a symbolic link": Hostile(tar_with(header(b"b.txt", 0, b"2")), train, DAMAGED, "a symbolic link"),
    "a hard link": Hostile(tar_with(header(b"b.txt", 0, b"1")), train, DAMAGED, "a hard link"),
    "a FIFO": Hostile(tar_with(header(b"b.txt", 0, b"6")), train, DAMAGED, "a FIFO"),
    "a device": Hostile(tar_with(header(b"b.txt", 0, b"3")), train, DAMAGED, "a character device"),
    "a name that climbs": Hostile(tar_with(member(b"../../b.txt", b"x")), train, DAMAGED, "leaves the archive"),
    "a name from the root": Hostile(tar_with(member(b"/etc/b.txt", b"x")), train, DAMAGED, "leaves the archive"),
    "a PAX path that climbs": Hostile(
        tar_with(pax(path="a/../../b.txt"), member(b"b.txt", b"x")), train, DAMAGED, "leaves the archive"
    ),
    "a PAX size": Hostile(
        tar_with(pax(size="99999999999"), member(b"b.txt", b"x")), train, DAMAGED, "overrides its size"
    ),
    "a PAX header for every member": Hostile(
        tar_with(pax(path="b.txt")[:156] + b"g" + pax(path="b.txt")[157:]), train, DAMAGED
    ),
    "a negative size": Hostile(tar_with(header(b"b.txt", b"-0000000001\0")), train, DAMAGED, "is no number"),
    "a negative binary size": Hostile(tar_with(header(b"b.txt", b"\xff" * 12)), train, DAMAGED, "is no number"),
    "a binary size of 2^87": Hostile(
        tar_with(header(b"b.txt", b"\x80" + b"\xff" * 11)), train, DAMAGED, "over the limit"
    ),
    "a member of 8 GB": Hostile(tar_with(header(b"b.txt", 8**11 - 1)), train, DAMAGED, "over the limit"),
    "a sound of 250 MB": Hostile(huge_member, evaluate, "SampleRejected", "not a readable WAV"),
    "members of 800 MB that nothing reads": Hostile(huge_unread, train, ""),
    "a tar of zeros in gzip": Hostile(
        written("x", lambda: gzip.compress(bytes(300 * 2**20), 9)), train, DAMAGED, "compressed (gzip)"
    ),
    "a tar of zeros in xz": Hostile(
        written("x", lambda: lzma.compress(bytes(100 * 2**20), preset=0)), train, DAMAGED, "compressed (xz)"
    ),
    "a member of zeros in gzip": Hostile(
        sample_with(**{"json.gz": lambda: gzip.compress(bytes(300 * 2**20), 9)}), train, ""
    ),
    "a PAX header of a PAX header": Hostile(tar_with(*[pax(path="b.txt")] * 2000), train, DAMAGED, "long name without"),
    "a PAX header of 10 MB": Hostile(
        tar_with(pax(comment="x" * 10**7), member(b"b.txt", b"x")), train, DAMAGED, "a PAX header or long name of"
    ),
    "long names without end": Hostile(
        tar_with(*[member(b"././@LongLink", b"n" * 60_000, b"L")] * 500), train, DAMAGED, "long name without"
    ),
    # images
    "a PNG of 50,000 x 50,000": Hostile(sample_with(png=png_of(50_000, 50_000), jpg=b""), train, BAD),
    "a JPEG called by a PNG of 50,000 x 50,000": Hostile(
        sample_with(jpg=png_of(50_000, 50_000)), train_and_evaluate, BAD, "pixels"
    ),
    "a PNG of 64 megapixels of nothing": Hostile(
        sample_with(jpg=lambda: encoded(Image.new("RGB", (8000, 8000)))), evaluate, ""
    ),
    "a transparent PNG of 64 megapixels": Hostile(
        sample_with(jpg=lambda: encoded(Image.new("LA", (8000, 8000)))), train_and_evaluate, BAD, "over the limit"
    ),
    "a progressive JPEG of 64 megapixels": Hostile(
        sample_with(jpg=lambda: encoded(Image.new("L", (8000, 8000)), "JPEG", progressive=True)),
        train_and_evaluate,
        BAD,
        "over the limit",
    ),
    "a progressive JPEG of 4000 scans": Hostile(sample_with(jpg=scans_jpeg), train_and_evaluate, BAD, "scans"),
    "a PNG with a bomb in zTXt": Hostile(sample_with(jpg=lambda: text_bomb(b"zTXt")), train_and_evaluate, BAD),
    "a PNG with a bomb in iTXt": Hostile(sample_with(jpg=lambda: text_bomb(b"iTXt")), train_and_evaluate, BAD),
    "a PNG with a bomb in iCCP": Hostile(sample_with(jpg=lambda: text_bomb(b"iCCP")), train_and_evaluate, BAD),
    "a JPEG that is cut off": Hostile(sample_with(jpg=photo()[:700]), train_and_evaluate, BAD, "not a readable JPEG"),
    "a JPEG that lies of its size": Hostile(sample_with(jpg=lying_jpeg), train_and_evaluate, BAD),
    "a CMYK JPEG of 64 megapixels": Hostile(
        sample_with(jpg=lambda: encoded(Image.new("CMYK", (8000, 8000)), "JPEG")), train_and_evaluate, BAD, "CMYK"
    ),
    "an animated PNG of 2^31 frames": Hostile(
        sample_with(jpg=lambda: apng(2**31 - 1)), train_and_evaluate, BAD, "frames"
    ),
    "an animated WebP of 10,000 frames": Hostile(
        sample_with(jpg=lambda: webp(10_000)), train_and_evaluate, BAD, "an animation of 10000 frames"
    ),
    "a WebP of 16,383 x 16,383": Hostile(sample_with(jpg=webp_canvas), train_and_evaluate, BAD, "limit"),
    "a GIF called jpg": Hostile(sample_with(jpg=gif), train_and_evaluate, BAD, "not a readable JPEG"),
    "a FITS called jpg": Hostile(sample_with(jpg=fits), train_and_evaluate, BAD, "not a readable JPEG"),
    "an EPS called jpg": Hostile(sample_with(jpg=EPS), train_and_evaluate, BAD, "not a readable JPEG"),
    "an SVG called jpg": Hostile(sample_with(jpg=SVG), train_and_evaluate, BAD, "not a readable JPEG"),
    "an HDF5 called jpg": Hostile(sample_with(jpg=HDF5), train_and_evaluate, BAD, "not a readable JPEG"),
    "a PSD called jpg": Hostile(sample_with(jpg=PSD), train_and_evaluate, BAD, "not a readable JPEG"),
    # sounds
    "a WAV of 2^31 samples": Hostile(sample_with(wav=wav_header(frames=2**31 - 1)), train, ""),
    "a WAV at 0 Hz": Hostile(sample_with(wav=wav_header(rate=0)), train_and_evaluate, BAD),
    "a WAV at 2^32 - 1 Hz": Hostile(sample_with(wav=wav_header(rate=2**32 - 1)), train_and_evaluate, BAD),
    "a WAV of 384 channels": Hostile(
        sample_with(wav=wav_header(channels=384)), train_and_evaluate, BAD, "384 channels"
    ),
    "a FLAC that lies of its channels": Hostile(sample_with(wav=flac_channels), train_and_evaluate, BAD),
    "a FLAC that lies of its length": Hostile(sample_with(wav=lying_flac), train_and_evaluate, BAD),
    "a WAV of NaN": Hostile(
        sample_with(wav=lambda: sound(np.full(100, np.nan, np.float32), subtype="FLOAT")),
        train_and_evaluate,
        BAD,
        "NaN",
    ),
    "a silent WAV": Hostile(sample_with(wav=lambda: sound(np.zeros(100))), train_and_evaluate, BAD, "silent"),
    "a chain of 3000 OGG streams": Hostile(sample_with(wav=ogg_chain), evaluate, ""),
    "an MP3 with a giant ID3": Hostile(sample_with(wav=giant_id3), train_and_evaluate, BAD),
    # text
    "a caption of 100 MB": Hostile(
        sample_with(txt=lambda: b"word " * (20 * 2**20)), train_and_evaluate, BAD, "over the limit"
    ),
    "a caption that is not UTF-8": Hostile(sample_with(txt=b"a\xff\xfe"), train_and_evaluate, BAD, "not UTF-8"),
    "a caption of one word": Hostile(sample_with(txt=letters(60_000)), train_and_evaluate, BAD, "a word of"),
    "a word told by numbers": Hostile(sample_with(txt=entities(10_000)), train_and_evaluate, BAD, "a word of"),
    "a word with controls in it": Hostile(
        sample_with(txt=letters(30_000, "\x01")), train_and_evaluate, BAD, "a word of"
    ),
    "a character of 5000 digits": Hostile(
        sample_with(txt=b"&#" + b"9" * 5000 + b";"), train_and_evaluate, BAD, "thousands of digits"
    ),
    "a caption of NULs": Hostile(sample_with(txt=b"a\0b" * 300), train, ""),
    "JSON of 100,000 levels": Hostile(facts('{"alt":' + "[" * 10**5 + "]" * 10**5 + "}"), train_on_facts, BAD, "JSON"),
    "JSON with NaN": Hostile(facts('{"alt": "x", "y": NaN}'), train_on_facts, BAD, "not finite"),
    "JSON with a number of a million digits": Hostile(facts('{"alt": ' + "9" * 999_000 + "}"), train_on_facts, BAD),
    "JSON of 2 MB": Hostile(facts('{"alt": "' + "x" * 2 * 10**6 + '"}'), train_on_facts, BAD, "over the limit"),
    "JSON that says everything twice": Hostile(facts('{"alt": "x", "alt": [[1]]}'), train_on_facts, BAD, "a caption"),
    "a class of a million digits": Hostile(sample_with(cls=b"9" * 10**6), evaluate, "SampleRejected", "over the limit"),
    # indices
    "an index of 100,000 levels": Hostile(
        indexed(lambda index: (index / "index.json").write_text("[" * 10**5)), train_with_index, "DataError"
    ),
    "an index of more samples than there are": Hostile(
        indexed(manifest(samples=2**60)), train_with_index, "DataError", "damaged"
    ),
    "an index with numbers as names": Hostile(indexed(manifest(path=7)), train_with_index, "DataError", "damaged"),
    "an index of objects": Hostile(indexed(objects), train_with_index, "DataError", "damaged"),
    "an index with a member of 4 GB": Hostile(
        indexed(array("sizes", lambda old: np.full_like(old, 2**32 - 1))), train_with_index, BAD, "over the limit"
    ),
    "an index that points past the end": Hostile(
        indexed(array("offsets", lambda old: old + np.uint64(2**40))), train_with_index, DAMAGED, "shorter than it was"
    ),
    "an index with an extension that has no name": Hostile(
        indexed(array("extensions", lambda old: old + np.uint16(9))), train_with_index, "DataError", "damaged"
    ),
    "an index with keys that are not UTF-8": Hostile(
        indexed(array("keys", lambda old: np.full_like(old, 255))), train_with_index, "DataError", "damaged"
    ),
    "an index whose samples overlap": Hostile(
        indexed(array("starts", lambda old: np.concatenate([old[:1], old[:0:-1][1:], old[-1:], old[-1:]]))),
        train_with_index,
        "DataError",
        "damaged",
    ),
    "an index that names a command": Hostile(
        indexed(manifest(path="pipe:touch canary")), train_with_index, "ConfigError", "no shell command"
    ),
    "an index that names another file": Hostile(indexed(elsewhere), train_with_index, "IndexStale"),
    "a part of an index with a pickle": Hostile(indexed(pickled_part, beside=True), train, ""),
    "a part of an index with a bomb": Hostile(indexed(bomb_part, beside=True), train, ""),
    "a part of an index that lacks something": Hostile(indexed(poor_part, beside=True), train, ""),
    "an index beside shards that names a command": Hostile(
        indexed(manifest(path="pipe:touch canary"), beside=True), train, ""
    ),
    # models
    "a pickle called safetensors": Hostile(export(saved_pickle), use_model, "ExportError"),
    "tensors that overlap": Hostile(export(tensors(OVERLAPPING, bytes(24))), use_model, "ExportError"),
    "tensors beyond the file": Hostile(
        export(tensors({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})), use_model, "ExportError"
    ),
    "a header of 2^63 bytes": Hostile(export(lambda: b"\xff" * 7 + b"\x7f{}"), use_model, "ExportError"),
    "a header of 100,000 levels": Hostile(export(tensors(b"[" * 10**5)), use_model, "ExportError"),
    "an export with other tensors": Hostile(export(tensors({})), use_model, "ExportError"),
    "an export with a name that climbs": Hostile(
        export(lambda: b"", sha256={"../../../../dev/zero": "0", "/dev/zero": "0"}), use_model, "ExportError"
    ),
    "an export whose weights are /dev/zero": Hostile(weights_link, use_model, "ExportError"),
    "an export of 100,000 levels": Hostile(
        export(lambda: b"", facts=json.loads("[" * 900 + "]" * 900)), use_model, "ExportError"
    ),
    "an export whose tower lies on a server": Hostile(
        export(tensors({}), clip=CLIP | {"vision_cfg": {"image_size": 32, "timm_model_name": "hf-hub:evil/model"}}),
        use_model,
        "ExportError",
    ),
    "a checkpoint that is a pickle": Hostile(checkpoint(saved_pickle), use_model, "CheckpointError"),
    "a checkpoint whose weights are /dev/zero": Hostile(checkpoint_link, use_model, "CheckpointError", "is no file"),
    "a checkpoint with overlaps": Hostile(
        checkpoint(tensors(OVERLAPPING, bytes(24))), use_model, "CheckpointError", "no readable checkpoint"
    ),
    "a checkpoint with other tensors": Hostile(checkpoint(tensors({})), use_model, "CheckpointError"),
    # configs
    "a config with a Python object": Hostile(
        config('!!python/object/apply:os.system ["touch canary"]'), read_config, "ConfigError", "YAML"
    ),
    "a run directory with a Python object": Hostile(
        run_directory('a: !!python/object/apply:os.system ["touch canary"]'), use_model, "ConfigError"
    ),
    "a config with _target_": Hostile(
        config(SOURCES + "model: {_target_: os.system, command: touch canary}"), read_config, "ConfigError", "_target_"
    ),
    "a config with class_path": Hostile(
        config(SOURCES + "engine: {class_path: os.system, init_args: {command: touch canary}}"),
        read_config,
        "ConfigError",
        "class_path",
    ),
    "an override with a Python object": Hostile(
        config(SOURCES),
        lambda folder: (
            load_config(
                [str(folder / "run.yaml")], ["--train.steps", '!!python/object/apply:os.system ["touch canary"]']
            )
            and None
        ),
        "ConfigError",
    ),
    "a config of 100,000 levels": Hostile(config("data: " + "[" * 10**5), read_config, "ConfigError", "YAML"),
    "a config that laughs": Hostile(config(laughs()), read_config, "ConfigError", "unknown field"),
    "a config whose shards are a command": Hostile(
        config("data: {sources: {a: {shards: 'pipe:touch canary'}}}"),
        lambda folder: ShardStream(load_config([str(folder / "run.yaml")]).data, SPEC, 1, 0) and None,
        "ConfigError",
        "no shell command",
    ),
}


def _run_a_command(folder: Path) -> None:
    subprocess.run(["touch", CANARY], check=True)


def _unpickle(folder: Path) -> None:
    pickle.loads(pickle.dumps(Path))


def _take_memory(folder: Path) -> None:
    assert np.ones(75 * 10**6).any()


def _call_a_server(folder: Path) -> None:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", 9), timeout=1)


def _write_elsewhere(folder: Path) -> None:
    (folder.parent / "elsewhere").write_text("x")


CONTROLS: dict[str, Hostile] = {
    "runs a command": Hostile(nothing, _run_a_command, ""),
    "unpickles": Hostile(nothing, _unpickle, ""),
    "takes 600 MB": Hostile(nothing, _take_memory, ""),
    "calls a server": Hostile(nothing, _call_a_server, ""),
    "writes elsewhere": Hostile(nothing, _write_elsewhere, ""),
}
"""What harm looks like, to see that it is seen."""
