"""Every kind of damage that tar readers pass over in silence is found, and no whole tar is refused."""

import gzip
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from webdataset import TarWriter

from mmcl.errors import ConfigError, ShardDamaged, ShardMissing
from mmcl_data import blobs
from mmcl_data.blobs import Blobs
from mmcl_data.scan import SampleEntry, expand_shards, read_sample, scan_shard

BLOCK = 512


def write_tar(path: Path, names: list[str], size: int = 700, **kwargs) -> Path:
    with tarfile.open(path, "w", **kwargs) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(b"p" * size))
    return path


def add(path: Path, **fields) -> Path:
    """A tar with one good sample, then a member with these TarInfo fields and no payload."""
    with tarfile.open(path, "w", format=fields.pop("format", tarfile.USTAR_FORMAT)) as tar:
        good = tarfile.TarInfo("a.txt")
        good.size = 3
        tar.addfile(good, io.BytesIO(b"abc"))
        bad = tarfile.TarInfo(fields.pop("name", "b.txt"))
        for field, value in fields.items():
            setattr(bad, field, value)
        tar.addfile(bad)
    return path


def cause_of(path: Path, **limits) -> ShardDamaged:
    with pytest.raises(ShardDamaged) as caught:
        scan_shard(path, **limits)
    assert caught.value.shard == str(path)
    assert 0 <= caught.value.offset <= path.stat().st_size
    return caught.value


NAMES = [f"{i:03d}.{extension}" for i in range(20) for extension in ("jpg", "txt")]
HEADERS = [i * 3 * BLOCK for i in range(len(NAMES))]  # 700 bytes fill two blocks


@pytest.fixture
def shard(tmp_path):
    return write_tar(tmp_path / "s.tar", NAMES, format=tarfile.USTAR_FORMAT)


def test_a_whole_shard_is_described_by_keys_extensions_offsets_and_sizes(shard):
    scan = scan_shard(shard)
    assert [sample.key for sample in scan.samples] == [f"{i:03d}" for i in range(20)]
    assert scan.samples[1] == SampleEntry("001", ("jpg", "txt"), (3584, 5120), (700, 700))
    assert read_sample(Blobs(), str(shard), scan.samples[1]) == {"jpg": b"p" * 700, "txt": b"p" * 700}


def test_a_shard_that_shrinks_after_the_scan_is_found_when_it_is_read(shard):
    sample = scan_shard(shard).samples[-1]
    os.truncate(shard, sample.offsets[-1] + 10)
    with pytest.raises(ShardDamaged, match="shorter than it was"):
        read_sample(Blobs(), str(shard), sample)


def test_members_far_apart_are_read_without_what_lies_between(tmp_path):
    names = ["a.jpg", ".hidden", "a.txt"]
    shard = write_tar(tmp_path / "s.tar", names, size=200_000)
    (sample,) = scan_shard(shard).samples
    asked = []

    class Spy(Blobs):
        def read(self, path, offset, size, known=None):
            asked.append(size)
            return super().read(path, offset, size, known)

    assert read_sample(Spy(), str(shard), sample) == {"jpg": b"p" * 200_000, "txt": b"p" * 200_000}
    assert asked == [200_000, 200_000]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars_of_python_are_accepted_in_every_format(tmp_path, form):
    names = ["dir.v1/" + "é" * 40 + ".jpg", "x" * 90 + "/" + "k" * 60 + ".seg.PNG"]
    if form != tarfile.USTAR_FORMAT:
        names.append("l" * 200 + "/" + "m" * 120 + ".txt")
    shard = write_tar(tmp_path / "s.tar", names, format=form)
    expected = [("dir.v1/" + "é" * 40, ("jpg",)), ("x" * 90 + "/" + "k" * 60, ("seg.png",))]
    expected += [("l" * 200 + "/" + "m" * 120, ("txt",))] * (len(names) - 2)
    assert [(sample.key, sample.extensions) for sample in scan_shard(shard).samples] == expected


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7", "oldgnu"])
def test_tars_of_gnu_tar_with_folders_are_accepted(tmp_path, form):
    (tmp_path / "in").mkdir()
    long = "n" * (120 if form in ("gnu", "pax", "oldgnu") else 60)
    for name in (f"{long}.jpg", f"{long}.txt", "README"):
        (tmp_path / "in" / name).write_text("content")
    command = ["tar", f"--format={form}", "--sort=name", "-cf", tmp_path / "s.tar", "-C", tmp_path, "./in"]
    subprocess.run(command, check=True)
    scan = scan_shard(tmp_path / "s.tar")
    assert [(sample.key, sample.extensions) for sample in scan.samples] == [(f"./in/{long}", ("jpg", "txt"))]
    assert scan.ignored == ("./in/README",)


@pytest.mark.parametrize("mtime", [None, 0])
def test_tars_of_webdataset_are_accepted_and_understood_alike(tmp_path, mtime):
    from webdataset.tariterators import base_plus_ext

    names = ["a/b.c/d.jpg", "x.tar.gz", "noextension", "a/k.JPG", ".hidden", "__meta__/x.json", "é/ü.txt"]
    with TarWriter(str(tmp_path / "s.tar"), encoder=False, mtime=mtime) as writer:
        for name in names:
            key, extension = base_plus_ext(name)
            if key:
                writer.write({"__key__": key, extension: b"content"})
    scan = scan_shard(tmp_path / "s.tar")
    theirs = [base_plus_ext(name) for name in names if base_plus_ext(name)[0] and not name.startswith("__")]
    assert [(s.key, s.extensions[0]) for s in scan.samples] == [(key, ext.lower()) for key, ext in theirs]


def test_a_tar_that_ends_right_after_its_two_blocks_of_zeros_is_accepted(shard):
    os.truncate(shard, HEADERS[-1] + 5 * BLOCK)  # as Go and Rust write them
    assert len(scan_shard(shard).samples) == 20


def test_every_single_flipped_byte_of_a_header_is_found(shard):
    content = bytearray(shard.read_bytes())
    for position in range(BLOCK):
        for mask in (0x01, 0x20, 0x80):
            content[HEADERS[20] + position] ^= mask
            shard.write_bytes(content)
            assert cause_of(shard).offset == HEADERS[20], position
            content[HEADERS[20] + position] ^= mask


def test_every_cut_is_found_wherever_it_lies(shard):
    content = shard.read_bytes()
    for length in range(0, HEADERS[-1] + 5 * BLOCK, 97):
        shard.write_bytes(content[:length])
        assert cause_of(shard).offset in (0, length), length


@pytest.mark.parametrize(
    ("length", "cause"),
    [
        (0, "the file is empty"),
        (100, "no tar"),
        (HEADERS[20] + 100, "cut off inside a header"),
        (HEADERS[20], "the two end-of-archive blocks are missing"),
        (HEADERS[20] + BLOCK + 10, r"cut off inside the payload of '010.jpg'"),
        (HEADERS[20] + BLOCK + 700, r"cut off inside the payload of '010.jpg'"),
        (HEADERS[-1] + 3 * BLOCK, "the two end-of-archive blocks are missing"),
        (HEADERS[-1] + 4 * BLOCK, "cut off inside the end-of-archive blocks"),
    ],
)
def test_a_cut_names_what_it_cut(shard, length, cause):
    os.truncate(shard, length)
    assert cause_of(shard).cause.startswith(cause.replace("\\", "")) or cause in cause_of(shard).cause


def test_a_tail_of_zeros_is_found(shard):
    content = shard.read_bytes()
    shard.write_bytes(content[: HEADERS[20]] + bytes(len(content) - HEADERS[20]))
    assert "zeros over lost members" in cause_of(shard).cause


def test_a_hole_of_zeros_is_found(shard):
    content = bytearray(shard.read_bytes())
    content[HEADERS[3] : HEADERS[5]] = bytes(HEADERS[5] - HEADERS[3])
    shard.write_bytes(content)
    assert cause_of(shard).offset == HEADERS[3]
    assert "with data behind them" in cause_of(shard).cause


def test_a_file_of_zeros_holds_no_sample(tmp_path):
    (tmp_path / "small.tar").write_bytes(bytes(10240))
    (tmp_path / "large.tar").write_bytes(bytes(2**20))
    assert "holds no sample" in cause_of(tmp_path / "small.tar").cause
    assert "zeros over lost members" in cause_of(tmp_path / "large.tar").cause


@pytest.mark.parametrize("garbage", [b"x", b"garbage" * 2000])
def test_data_after_the_end_are_found(shard, garbage):
    with open(shard, "ab") as file:
        file.write(garbage)
    cause_of(shard)


def test_an_appended_second_archive_is_found(shard):
    shard.write_bytes(shard.read_bytes() * 2)
    cause_of(shard)


def test_a_large_blocking_factor_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    subprocess.run(["tar", "-b", "128", "-cf", "s.tar", "a.txt"], check=True, cwd=tmp_path)
    assert "tar -b 20" in cause_of(tmp_path / "s.tar").cause


def test_members_of_one_sample_that_lie_apart_are_found(tmp_path):
    shard = write_tar(tmp_path / "s.tar", ["a.jpg", "b.jpg", "b.txt", "a.txt"])
    assert "'a' do not lie side by side" in cause_of(shard).cause


@pytest.mark.parametrize("names", [["a.jpg", "a.txt", "a.jpg"], ["a.jpg", "a.JPG"]])
def test_a_member_that_appears_twice_is_found(tmp_path, names):
    assert "appears twice" in cause_of(write_tar(tmp_path / "s.tar", names)).cause


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"type": tarfile.LNKTYPE, "linkname": "a.txt"}, "a hard link"),
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "a symbolic link"),
        ({"type": tarfile.CHRTYPE}, "a character device"),
        ({"type": tarfile.BLKTYPE}, "a block device"),
        ({"type": tarfile.FIFOTYPE}, "a FIFO"),
        ({"type": b"S"}, "a sparse file"),
        ({"type": b"M"}, "of type b'M'"),
        ({"name": "../../b.txt"}, "leaves the archive"),
        ({"name": "/b.txt"}, "leaves the archive"),
        ({"name": "b\n.txt"}, "control characters"),
        ({"format": tarfile.PAX_FORMAT, "pax_headers": {"GNU.sparse.size": "9"}}, "a sparse file"),
        ({"format": tarfile.PAX_FORMAT, "pax_headers": {"size": "99999999999"}}, "overrides its size"),
        ({"format": tarfile.PAX_FORMAT, "pax_headers": {"path": "../b.txt"}}, "leaves the archive"),
        ({"format": tarfile.PAX_FORMAT, "pax_headers": {"comment": "x" * 100_000}}, "a PAX header or long name of"),
    ],
)
def test_hostile_members_are_refused(tmp_path, fields, cause):
    assert cause in cause_of(add(tmp_path / "s.tar", **fields)).cause


def test_sparse_files_of_gnu_tar_are_refused(tmp_path):
    with open(tmp_path / "b.txt", "wb") as file:
        file.truncate(2**30)
    for form in ("gnu", "pax"):
        command = ["tar", f"--format={form}", "--sparse", "--hole-detection=raw", "-cf", "s.tar", "b.txt"]
        with open(tmp_path / "b.txt", "wb") as file:
            file.truncate(2**20)
        subprocess.run(command, check=True, cwd=tmp_path)
        assert "a sparse file" in cause_of(tmp_path / "s.tar").cause


def patch_header(path: Path, at: int, start: int, value: bytes) -> None:
    """Overwrite a field of a header and mend its checksum."""
    content = bytearray(path.read_bytes())
    content[at + start : at + start + len(value)] = value
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + BLOCK])
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("size", "cause"),
    [
        (b"-0000000001\0", "is no number"),
        (b"\xff" * 12, "is no number"),
        (b"\x80" + bytes(5) + b"\x7f" * 6, "over the limit"),
        (b"77777777777\0", "over the limit"),
        (b"00000007000\0", ""),
        (b"0_000000001\0", "is no number"),
        (b"9999\0       ", "is no number"),
    ],
)
def test_sizes_that_lie_are_found(shard, size, cause):
    patch_header(shard, HEADERS[4], 124, size)
    assert cause in cause_of(shard).cause


def test_a_member_over_the_limit_is_refused_before_it_is_read(shard):
    assert "'000.jpg' of 700 bytes is over the limit of 699" in cause_of(shard, max_member_bytes=699).cause


@pytest.mark.parametrize("record", [b"0 path=b.txt\n", b"5 a=b\n", b"999 a=b\n", b"path=x\n", b"6 a=b\n\x00\x00x"])
def test_malformed_pax_headers_are_refused_and_never_read_for_ever(tmp_path, record):
    good = {"comment": "y" * 40}
    shard = add(tmp_path / "s.tar", format=tarfile.PAX_FORMAT, pax_headers=good)
    content = shard.read_bytes()
    at = content.index(b"y" * 40) // BLOCK * BLOCK
    line_end = content.index(b"\n", at) + 1
    shard.write_bytes(content[:at] + record.ljust(line_end - at, b"z") + content[line_end:])
    assert "a malformed PAX header" in cause_of(shard).cause


def test_a_name_that_is_not_utf8_is_refused(shard):
    patch_header(shard, HEADERS[0], 0, b"\xff\xfe.jpg")
    assert "is not UTF-8" in cause_of(shard).cause


def test_a_long_name_without_its_member_is_found(tmp_path):
    shard = write_tar(tmp_path / "s.tar", ["a.txt", "l" * 200 + ".txt"], format=tarfile.GNU_FORMAT)
    content = shard.read_bytes()
    at = content.index(b"l" * 200 + b".txt") + BLOCK
    shard.write_bytes(content[: at // BLOCK * BLOCK] + bytes(10240 - at // BLOCK * BLOCK))
    assert "a long name without its member" in cause_of(shard).cause


def test_a_compressed_tar_is_told_to_be_decompressed(shard):
    shard.write_bytes(gzip.compress(shard.read_bytes(), compresslevel=0))
    assert "compressed (gzip)" in cause_of(shard).cause
    shard.write_bytes(gzip.compress(b""))
    assert "compressed (gzip)" in cause_of(shard).cause


def test_what_is_no_tar_is_refused(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"<html>404 not found</html>" * 100)
    assert cause_of(tmp_path / "s.tar").cause.startswith("no tar")


def test_a_shard_without_a_sample_is_refused(tmp_path):
    assert "holds no sample" in cause_of(write_tar(tmp_path / "s.tar", ["README", "LICENSE"])).cause


def test_a_fifo_is_refused_instead_of_waited_on(tmp_path):
    os.mkfifo(tmp_path / "s.tar")
    assert cause_of(tmp_path / "s.tar").cause == "not a regular file"


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(ShardMissing, match=r"nowhere\.tar"):
        scan_shard(tmp_path / "nowhere.tar")


def test_a_scan_reads_headers_and_not_payloads(tmp_path, monkeypatch):
    shard = write_tar(tmp_path / "s.tar", [f"{i}.bin" for i in range(3)], size=20 * 2**20, format=tarfile.USTAR_FORMAT)
    read = []

    def pread(file, size, offset):
        read.append(size)
        return os.pread(file, size, offset)

    monkeypatch.setattr(blobs, "pread", pread)
    assert scan_shard(shard).samples[2].sizes == (20 * 2**20,)
    assert sum(read) < 20_000


def test_shards_are_found_by_file_directory_glob_and_braces(tmp_path):
    names = [f"{i:06d}.tar" for i in range(12)]
    for name in (*names, "readme.txt"):
        (tmp_path / name).touch()
    found = [str(tmp_path / name) for name in names]
    assert expand_shards(str(tmp_path)) == found
    assert expand_shards(f"{tmp_path}/*.tar") == found
    assert expand_shards(f"{tmp_path}/{{000000..000011}}.tar") == found
    assert expand_shards(f"{tmp_path}/00000{{1,0}}.tar") == [found[1], found[0]]
    assert expand_shards(found[3]) == [found[3]]


@pytest.mark.parametrize("spec", ["{0..2}.tar", "9.tar", "x*.tar", "empty", "a\0b"])
def test_shards_that_are_not_there_are_named(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "0.tar").touch()
    (tmp_path / "1.tar").touch()
    with pytest.raises(ShardMissing):
        expand_shards(spec)


@pytest.mark.parametrize(
    "spec",
    [
        *(
            "pipe:touch canary",
            " pipe:touch canary",
            "PIPE:touch canary",
            "file:0.tar",
            "file:///0.tar",
            "ftp://h/0.tar",
        ),
        *("gs://b/0.tar", "s3:b/0.tar", "memory://0.tar", "simplecache::https://h/0.tar", "", "{0..1"),
        *("https://h/shards/", "https://h/*.tar"),
    ],
)
def test_transports_and_malformed_patterns_are_refused_and_start_nothing(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        expand_shards(spec)
    assert not list(tmp_path.iterdir())


def test_a_pattern_of_a_thousand_million_shards_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match="more than"):
        expand_shards(f"{tmp_path}/{{000000000..999999999}}.tar")


def test_a_shard_named_twice_is_refused(tmp_path):
    (tmp_path / "0.tar").touch()
    with pytest.raises(ConfigError, match="named twice"):
        expand_shards(f"{tmp_path}/{{0,0}}.tar")
