"""Each corpus, laid out as it is published, comes out of its shards as it went in."""

import io
import json
import sys

import numpy as np
import pytest
import soundfile
from build_cases import build, picture, png, put, read, sound, table, wav
from data_cases import SPEC
from PIL import Image

from mmcl.errors import ConfigError, DataError, MissingExtra, NoUsableSamples
from mmcl_data.build.items import make_key
from mmcl_data.evalsets import read_classes


def skipped(manifest):
    return dict(map(tuple, manifest["skipped"]))


def test_files_of_one_stem_are_a_sample(tmp_path):
    root = tmp_path / "c"
    for name, data in {
        "birds/crow.png": png(1), "birds/crow.wav": wav(1), "birds/crow.txt": "a crow", "birds/crow.json": '{"n": 1}',
        "birds/v1.5.jpg": picture(2, "JPEG"), "birds/v1.5.txt": "dotted", "z.png": png(3), "z.cls": "4\n",
        "alone.txt": "nothing to see", "mute.png": png(4), ".hidden.png": png(5), "notes.doc": "no",
        "birds/crow.jpg": picture(1, "JPEG"),
    }.items():  # fmt: skip
        put(root / name, data)
    manifest = build("folder", root, tmp_path / "out")
    samples = read(tmp_path / "out")
    dotted = make_key("birds/v1.5")
    assert samples.keys() == {"birds__crow", dotted, "z"} and "." not in dotted
    assert samples["birds__crow"] == {
        "jpg": picture(1, "JPEG"), "wav": wav(1), "txt": "a crow", "json": {"n": 1},
    }  # fmt: skip
    assert samples["z"] == {"png": png(3), "cls": 4}
    assert skipped(manifest) == {
        "birds/crow.png": "a second picture beside birds/crow.jpg",
        "alone": "caption without a picture or sound",
        "notes.doc": "an extension that means nothing here",
        "mute": "nothing to learn from: image alone",
    }
    assert manifest["counts"] == {
        "samples": 3, "audio": 1, "class": 1, "facts": 1, "image": 3, "text": 2, "skipped": 4,
    }  # fmt: skip


@pytest.mark.parametrize("form", ["BMP", "TIFF", "GIF"])
def test_pictures_of_other_formats_become_png_without_loss(tmp_path, form):
    put(tmp_path / "c" / f"a.{form.lower()}", picture(1, form))
    put(tmp_path / "c" / "a.txt", "a")
    build("folder", tmp_path / "c", tmp_path / "out")
    made = Image.open(io.BytesIO(read(tmp_path / "out")["a"]["png"])).convert("RGB")
    assert made.tobytes() == Image.open(io.BytesIO(picture(1, form))).convert("RGB").tobytes()


@pytest.mark.parametrize(("form", "subtype"), [("AIFF", "PCM_16"), ("AU", "PCM_24"), ("CAF", "PCM_S8"), ("AU", "ULAW")])
def test_sounds_of_other_formats_become_flac_without_loss(tmp_path, form, subtype):
    put(tmp_path / "c" / f"a.{form.lower()}", sound(form, subtype))
    put(tmp_path / "c" / "a.txt", "a")
    build("folder", tmp_path / "c", tmp_path / "out")
    before = soundfile.read(io.BytesIO(sound(form, subtype)))[0]
    assert np.array_equal(soundfile.read(io.BytesIO(read(tmp_path / "out")["a"]["flac"]))[0], before)


def test_what_no_decoder_reads_is_left_out_with_its_reason(tmp_path):
    bad = {
        "cmyk.tif": (picture(1, "TIFF", "CMYK"), "mode CMYK has no PNG without loss"),
        "float.aiff": (sound("AIFF", "FLOAT"), "FLOAT samples has no FLAC without loss"),
        "clip.m4a": (b"\0\0\0\x20ftypM4A " + bytes(20), "MP4 or M4A file, which is not read: turn it into FLAC"),
        "lies.jpg": (b"<html>not found</html>", "no picture or sound of a known kind: it begins with b'<html>no'"),
        "cut.bmp": (picture(1, "BMP")[:60], "cannot be decoded"),
        "empty.png": (b"", "is empty"),
    }
    for name, (data, _) in bad.items():
        put(tmp_path / "c" / name, data)
        put(tmp_path / "c" / name.replace(name[-3:], "txt").replace(".atxt", ".txt"), "a")
    put(tmp_path / "c" / "wrong name.jpg", png(3))
    put(tmp_path / "c" / "wrong name.txt", "a")
    told = skipped(build("folder", tmp_path / "c", tmp_path / "out"))
    for name, (_, reason) in bad.items():
        assert reason in told[name.split(".")[0]]
    assert [set(members) for members in read(tmp_path / "out").values()] == [{"png", "txt"}], "stored as what it holds"


ROWS = [["pics/a.png", "first", 1.5], ["pics/b.png", "second, with a comma", 2.5]]


@pytest.fixture
def pics(tmp_path):
    for number, name in enumerate("abc"):
        put(tmp_path / "c" / "pics" / f"{name}.png", png(number))
    return tmp_path / "c"


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_manifest_of_any_kind_gives_the_same_samples(pics, tmp_path, kind):
    header, path = "filepath,caption,score", pics / f"m.{kind}"
    dicts = [dict(zip(header.split(","), row, strict=True)) for row in ROWS]
    if kind == "jsonl":
        put(path, "".join(json.dumps(row) + "\n" for row in dicts))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        write_table(pyarrow.Table.from_pylist(dicts), path)
    else:
        table(path, header, *ROWS, delimiter="," if kind == "csv" else "\t")
    build("manifest", pics, tmp_path / "out", manifest=str(path))
    first, second = (read(tmp_path / "out")[key] for key in sorted(read(tmp_path / "out")))
    assert first["png"] == png(0) and first["txt"] == "first" and float(first["json"]["score"]) == 1.5
    assert second["txt"] == "second, with a comma"


def test_columns_are_named_or_guessed_and_keys_are_a_column_or_the_line(pics, tmp_path):
    put(pics / "s.wav", wav(1))
    put(pics / "m.jsonl", json.dumps({"img": "pics/a.png", "voice": "s.wav", "says": ["one", "two"], "id": "x/1"}))
    words = {"manifest": str(pics / "m.jsonl"), "audio_column": "voice", "text_column": "says"}
    build("manifest", pics, tmp_path / "one", **words)
    build("manifest", pics, tmp_path / "two", key_column="id", **words)
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one["000000001"] == {
        "png": png(0), "wav": wav(1), "txt": "one", "json": {"captions": ["one", "two"], "id": "x/1"},
    }  # fmt: skip
    assert two.keys() == {"x__1"}


@pytest.mark.parametrize(
    ("header", "words", "message"),
    [
        ("a,b", {}, "the columns are a, b: none is known to hold paths"),
        ("image,b", {}, "the columns are image, b: none is known to hold captions"),
        ("image,caption", {"text_column": "txt"}, "no 'txt', as --text-column says"),
        ("image,image", {}, "names each column once"),
    ],
)
def test_columns_that_make_no_pair_are_listed(pics, tmp_path, header, words, message):
    path = table(pics / "m.csv", header, ["pics/a.png", "x"])
    with pytest.raises((ConfigError, DataError), match=message):
        build("manifest", pics, tmp_path / "out", manifest=str(path), **words)


def test_malformed_rows_are_reported_with_their_line(pics, tmp_path):
    put(pics / "m.csv", b'image,caption\npics/a.png,"two\nlines"\npics/b.png\n,none\npics/c.png,\xff\npics/gone.png,x\n'
        b"pics/b.png,   \n")  # fmt: skip
    manifest = build("manifest", pics, tmp_path / "out", manifest=str(pics / "m.csv"))
    assert skipped(manifest) == {
        "m.csv line 4": "1 fields, where the header has 2",
        "m.csv line 5": "no path",
        "m.csv line 6": "not UTF-8",
        "000000007": "pics/gone.png is missing",
        "000000008": "the caption is empty",
    }
    assert read(tmp_path / "out")["000000002"]["txt"] == "two\nlines"


def test_lines_that_are_no_objects_are_reported_and_numbers_that_are_none_become_null(pics, tmp_path):
    rows = ['{"image": "pics/a.png", "caption": "x", "score": NaN}', "{", "[1]", '{"image": 3, "caption": "x"}']
    put(pics / "m.jsonl", "\n".join([*rows, '{"image": "pics/b.png", "caption": "\\ud800"}']))
    manifest = build("manifest", pics, tmp_path / "out", manifest=str(pics / "m.jsonl"))
    assert [where for where, _ in manifest["skipped"]] == [
        "m.jsonl line 2", "m.jsonl line 3", "m.jsonl line 4", "000000005",
    ]  # fmt: skip
    assert read(tmp_path / "out")["000000001"]["json"] == {"score": None}


def test_a_stray_quote_is_an_error_that_names_its_line_and_the_option(pics, tmp_path):
    path = put(pics / "m.tsv", 'image\tcaption\npics/a.png\t"so" she said\n')
    with pytest.raises(DataError, match=r"line 2 is malformed.*--quotes false"):
        build("manifest", pics, tmp_path / "out", manifest=str(path))
    build("manifest", pics, tmp_path / "two", manifest=str(path), quotes=False)
    assert read(tmp_path / "two")["000000002"]["txt"] == '"so" she said'


def test_pages_of_parquet_that_are_corrupt_are_an_error_with_their_row(pics, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import ParquetFile, write_table

    rows = pyarrow.table({"image": ["pics/a.png"] * 9, "caption": [wav(number).hex() for number in range(9)]})
    write_table(rows, pics / "m.parquet", row_group_size=3, compression="snappy")
    overwrite(pics / "m.parquet", ParquetFile(pics / "m.parquet").metadata.row_group(1).column(1))
    with pytest.raises(DataError, match=r"m\.parquet: row 4 and what follows cannot be read"):
        build("manifest", pics, tmp_path / "out", manifest=str(pics / "m.parquet"))


def overwrite(path, column):
    """Put zeros where the data of a column of Parquet are."""
    with path.open("r+b") as file:
        file.seek(column.data_page_offset + column.total_compressed_size // 4)
        file.write(bytes(column.total_compressed_size // 2))


def test_pictures_within_a_table_are_not_read(pics, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import ParquetFile, write_table

    held = [{"bytes": np.random.default_rng(number).bytes(200_000), "path": "x"} for number in range(3)]
    rows = pyarrow.table({"file": ["pics/a.png"] * 3, "caption": list("abc"), "pic.ture": held, "md5": [b"1"] * 3})
    path = pics / "m.parquet"
    write_table(rows, path, compression="snappy", use_dictionary=False)
    overwrite(path, ParquetFile(path).metadata.row_group(0).column(2))  # so that reading it would be an error
    build("manifest", pics, tmp_path / "out", manifest=str(path))
    assert [(s["txt"], s["json"]) for s in map(read(tmp_path / "out").get, ("000000001", "000000003"))] == [
        ("a", {"pic.ture": None, "md5": None}), ("c", {"pic.ture": None, "md5": None}),
    ]  # fmt: skip
    words = {"manifest": str(path), "image_column": "pic.ture"}
    with pytest.raises(NoUsableSamples, match=r"row 1: column 'pic.ture' holds a bytes, not a path"):
        build("manifest", pics, tmp_path / "two", **words)


@pytest.mark.parametrize("path", ["../secret.png", "pics/../../secret.png", "/etc/passwd", ".", "http://x/a.png"])
def test_a_path_that_leaves_the_root_costs_its_row_only(pics, tmp_path, path):
    put(tmp_path / "secret.png", png(9))
    table(pics / "m.csv", "image,caption", [path, "x"], ["pics/a.png", "x"])
    manifest = build("manifest", pics, tmp_path / "out", manifest=str(pics / "m.csv"))
    ((where, why),) = manifest["skipped"]
    assert where == "m.csv line 2" and why.startswith(f"{path!r} is") and "m.csv" not in why
    assert ("img2dataset" in why) is ("://" in path) and ("--root" in why) is ("://" not in path)
    assert [sample["png"] for sample in read(tmp_path / "out").values()] == [png(0)]


def test_a_bad_path_costs_its_row_in_published_tables_too(tmp_path):
    put(tmp_path / "c/a.json", json.dumps([{"image": "../x.jpg", "caption": "x"}, {"image": "a.jpg", "caption": "a"}]))
    put(tmp_path / "c/a.jpg", picture(1, "JPEG"))
    assert skipped(build("coco", tmp_path / "c", tmp_path / "coco", annotations="a.json")).keys() == {"a.json"}
    header = "filename,fold,target,category"
    table(tmp_path / "c/meta/esc50.csv", header, ["a.wav", 1, 0, "dog"], ["../../x.wav", 1, 0, "dog"])
    put(tmp_path / "c/audio/a.wav", wav(1))
    assert skipped(build("esc50", tmp_path / "c", tmp_path / "esc50")).keys() == {"esc50.csv line 3"}


def test_an_absolute_path_below_the_root_is_taken(pics, tmp_path):
    table(pics / "m.csv", "image,caption", [pics / "pics" / "a.png", "x"])
    build("manifest", pics, tmp_path / "out", manifest=str(pics / "m.csv"))
    assert read(tmp_path / "out")["000000002"]["png"] == png(0)


def test_a_link_that_leaves_the_root_is_not_followed(pics, tmp_path):
    put(tmp_path / "secret.png", png(9))
    (pics / "pics" / "d.png").symlink_to(tmp_path / "secret.png")
    (pics / "pics" / "e.png").symlink_to("a.png")
    (pics / "away").symlink_to(tmp_path)
    rows = [[f"pics/{name}.png", "x"] for name in "de"] + [["away/secret.png", "x"]]
    table(pics / "m.csv", "image,caption", *rows)
    told = skipped(build("manifest", pics, tmp_path / "out", manifest=str(pics / "m.csv")))
    assert told.keys() == {"000000002", "000000004"} and "leaves the root" in told["000000002"]
    assert read(tmp_path / "out")["000000003"]["png"] == png(0)


@pytest.mark.parametrize(("path", "remedy"), [("http://x/a.png", "img2dataset"), ("/nowhere/a.png", "--root")])
def test_a_table_of_paths_that_are_all_elsewhere_is_given_up_early_with_the_remedy(pics, tmp_path, path, remedy):
    header, bad, good = "image,caption\n", f"{path},x\n", "pics/a.png,x\n"
    words = {"manifest": str(put(pics / "m.csv", header + 99 * bad + good))}
    assert build("manifest", pics, tmp_path / "out", **words)["counts"]["skipped"] == 99
    put(pics / "m.csv", header + 100 * bad + 'pics/a.png,"never read\n')
    with pytest.raises(DataError, match=rf"m\.csv line 2: .*{remedy}.* all of the first 100"):
        build("manifest", pics, tmp_path / "two", **words)
    put(pics / "m.csv", header + bad)
    with pytest.raises(NoUsableSamples, match=rf"no sample of manifest there; m\.csv line 2: .*{remedy}"):
        build("manifest", pics, tmp_path / "three", **words)


def test_a_folder_for_each_class_is_a_labelled_set(tmp_path):
    root = tmp_path / "c"
    for number, name in enumerate(["b_c/x.png", "b_c/deep/y.png", "a/x.png"]):
        put(root / name, png(number))
    put(root / "a" / "notes.txt", "no")
    manifest = build("imagefolder", root, tmp_path / "out", caption_template="a photo of {}")
    samples = read(tmp_path / "out")
    assert {(s["cls"], s["txt"], s["json"]["class"], s["json"]["file"]) for s in samples.values()} == {
        (0, "a photo of a", "a", "a/x.png"),
        (1, "a photo of b c", "b c", "b_c/x.png"),
        (1, "a photo of b c", "b c", "b_c/deep/y.png"),
    }
    assert skipped(manifest) == {"a/notes.txt": "no picture or sound"}
    classes = read_classes(tmp_path / "out", SPEC)
    assert classes.classnames == ["a", "b c"] and len(classes.batches.samples) == 3


CAPTIONS = [{"image_id": 7, "id": n, "caption": f"caption {n}"} for n in range(5)]
COCO = {"images": [{"id": 7, "file_name": "000000000007.jpg"}, {"id": 8, "file_name": "000000000008.jpg"}],
        "annotations": [*CAPTIONS, {"image_id": 8, "id": 9, "caption": "other"}]}  # fmt: skip
KARPATHY = {"dataset": "coco", "images": [
    {"filepath": "val2014", "filename": f"COCO_val2014_{n:012d}.jpg", "imgid": n, "cocoid": 40 + n, "split": split,
     "sentids": [n], "sentences": [{"raw": f"says {n}", "tokens": ["says"], "imgid": n, "sentid": n}]}
    for n, split in enumerate(["train", "restval", "test"])]}  # fmt: skip
FLICKR = {"dataset": "flickr30k", "images": [
    {"filename": "1000092795.jpg", "imgid": 0, "split": "test", "sentences": [{"raw": "men"}]}]}  # fmt: skip
BLIP = [{"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["one", "two"]}]


def test_coco_has_a_sample_for_each_picture_with_all_its_captions(tmp_path):
    put(tmp_path / "c/annotations/captions_val2017.json", json.dumps(COCO))
    for number in (7, 8):
        put(tmp_path / f"c/val2017/{number:012d}.jpg", picture(number, "JPEG"))
    build("coco", tmp_path / "c", tmp_path / "out", annotations="annotations/captions_val2017.json")
    samples = read(tmp_path / "out")
    assert samples["000000000007"]["txt"] == "caption 0"
    assert samples["000000000007"]["json"] == {"image_id": 7, "captions": [f"caption {n}" for n in range(5)]}
    assert samples["000000000008"]["json"]["captions"] == ["other"]


def test_the_splits_of_karpathy_can_be_chosen(tmp_path):
    put(tmp_path / "c/dataset_coco.json", json.dumps(KARPATHY))
    for number in range(3):
        put(tmp_path / f"c/val2014/COCO_val2014_{number:012d}.jpg", picture(number, "JPEG"))
    build("coco", tmp_path / "c", tmp_path / "out", annotations="dataset_coco.json", split="train,restval")
    facts = [sample["json"] for sample in read(tmp_path / "out").values()]
    assert sorted((fact["split"], fact["image_id"]) for fact in facts) == [("restval", 41), ("train", 40)]
    with pytest.raises(ConfigError, match="has restval, test, train"):
        build("coco", tmp_path / "c", tmp_path / "two", annotations="dataset_coco.json", split="dev")


@pytest.mark.parametrize(
    ("content", "name"), [(FLICKR, "flickr30k-images/1000092795.jpg"), (BLIP, "images/" + BLIP[0]["image"])]
)
def test_other_files_of_karpathys_splits_are_read(tmp_path, content, name):
    put(tmp_path / "c/k.json", json.dumps(content))
    put(tmp_path / "c" / name, picture(1, "JPEG"))
    assert build("coco", tmp_path / "c", tmp_path / "out", annotations="k.json")["counts"]["samples"] == 1
    (sample,) = read(tmp_path / "out").values()
    assert sample["txt"] in ("men", "one")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        '{"images": [{}]}',
        '{"images": [], "annotations": [{}]}',
        '{"images": []}',
        '[{"image": 1, "caption": "x"}]',
    ],
)
def test_another_json_is_no_coco(tmp_path, content):
    put(tmp_path / "c/k.json", content)
    with pytest.raises(DataError):
        build("coco", tmp_path / "c", tmp_path / "out", annotations="k.json")


def test_audiocaps_has_a_sample_for_each_clip_with_all_its_captions(tmp_path):
    rows = [[1, "abc-_123456", 30, "a dog barks"], [2, "abc-_123456", 30, "barking"], [3, "lostlostlos", 0, "x"],
            [4, "zzzzzzzzzzz", 5, "rain"]]  # fmt: skip
    table(tmp_path / "c/test.csv", "audiocap_id,youtube_id,start_time,caption", *rows)
    put(tmp_path / "c/test/Yabc-_123456.wav", wav(1))
    put(tmp_path / "c/test/zzzzzzzzzzz_5.wav", wav(2))
    manifest = build("audiocaps", tmp_path / "c", tmp_path / "out", csv="test.csv")
    samples = read(tmp_path / "out")
    assert samples.keys() == {"abc-_123456_30", "zzzzzzzzzzz_5"}
    assert samples["abc-_123456_30"]["json"] == {
        "youtube_id": "abc-_123456", "start_time": "30", "audiocap_ids": ["1", "2"],
        "captions": ["a dog barks", "barking"],
    }  # fmt: skip
    assert skipped(manifest) == {"lostlostlos_0": "no sound of that name"}


def test_clotho_has_five_captions(tmp_path):
    header = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5"
    table(tmp_path / "c/clotho_captions_development.csv", header, ["Distorted AM (2).wav", *"abcde"])
    put(tmp_path / "c/development/Distorted AM (2).wav", wav(1))
    words = {"csv": "clotho_captions_development.csv", "audio": "development"}
    build("clotho", tmp_path / "c", tmp_path / "out", **words)
    (sample,) = read(tmp_path / "out").values()
    assert sample["txt"] == "a" and sample["json"] == {"file": "Distorted AM (2).wav", "captions": list("abcde")}
    table(tmp_path / "c/other.csv", "file_name,caption_1", ["x", "y"])
    with pytest.raises(DataError, match=r"no column 'caption_2'; the table has file_name, caption_1"):
        build("clotho", tmp_path / "c", tmp_path / "two", csv="other.csv", audio="development")


def test_esc50_is_a_labelled_set(tmp_path):
    header = "filename,fold,target,category,esc10,src_file,take"
    rows = [["1-100032-A-0.wav", 1, 0, "dog", True, 100032, "A"], ["2-1-A-1.wav", 2, 1, "sea_waves", False, 1, "A"]]
    table(tmp_path / "c/meta/esc50.csv", header, *rows)
    for number, row in enumerate(rows):
        put(tmp_path / "c/audio" / str(row[0]), wav(number))
    build("esc50", tmp_path / "c", tmp_path / "out")
    samples = read(tmp_path / "out")
    assert samples["2-1-A-1"]["cls"] == 1 and samples["2-1-A-1"]["json"] == {
        "class": "sea waves", "fold": 2, "file": "2-1-A-1.wav",
    }  # fmt: skip
    assert read_classes(tmp_path / "out", SPEC).classnames == ["dog", "sea waves"]
    build("esc50", tmp_path / "c", tmp_path / "two", folds="2", caption_template="the sound of {}")
    assert [sample["txt"] for sample in read(tmp_path / "two").values()] == ["the sound of sea waves"]
    assert (tmp_path / "two/classnames.txt").read_text() == "dog\nsea waves\n", "numbers are those of the whole set"
    with pytest.raises(ConfigError, match="'6' is none of 1 to 5"):
        build("esc50", tmp_path / "c", tmp_path / "three", folds="6")


def test_urbansound8k_lies_in_folds(tmp_path):
    header = "slice_file_name,fsID,start,end,salience,fold,classID,class"
    rows = [["100032-3-0-0.wav", 100032, 0.0, 0.3, 1, 5, 1, "dog_bark"], ["7-0-0-0.wav", 7, 0, 4, 2, 10, 0, "siren"]]
    table(tmp_path / "c/metadata/UrbanSound8K.csv", header, *rows)
    put(tmp_path / "c/audio/fold5/100032-3-0-0.wav", wav(1))
    put(tmp_path / "c/audio/fold10/7-0-0-0.wav", wav(2))
    build("urbansound8k", tmp_path / "c", tmp_path / "out")
    sample = read(tmp_path / "out")["100032-3-0-0"]
    assert (sample["cls"], sample["json"]["class"], sample["json"]["fold"]) == (1, "dog bark", 5)
    assert read_classes(tmp_path / "out", SPEC).classnames == ["siren", "dog bark"]


def test_strong_labels_of_audioset_are_events_in_order(tmp_path):
    rows = [["b0RFKhbpFJA_30000", 4.75, 9.99, "/m/b"], ["b0RFKhbpFJA_30000", 0.0, 5.0, "/m/a"],
            ["b0RFKhbpFJA_30000", 6.0, 7.0, "/m/a"], ["b0RFKhbpFJA_30000", 6.0, "x", "/m/a"],
            ["b0RFKhbpFJA_30000", 9.0, 7.0, "/m/a"], ["b0RFKhbpFJA_30000", 0.0, 7.0, "/m/zz"]]  # fmt: skip
    table(tmp_path / "c/t.tsv", "segment_id,start_time_seconds,end_time_seconds,label", *rows, delimiter="\t")
    put(tmp_path / "c/mid.tsv", "/m/a\tMale speech, man speaking\n/m/b\tBark\n")
    put(tmp_path / "c/clips/Yb0RFKhbpFJA_30000.wav", wav(1))
    manifest = build("audioset-strong", tmp_path / "c", tmp_path / "out", tsv="t.tsv", labels="mid.tsv")
    sample = read(tmp_path / "out")["b0RFKhbpFJA_30000"]
    assert sample["txt"] == "Male speech, man speaking, then Bark"
    assert [(e["start"], e["end"], e["label"], e["mid"]) for e in sample["json"]["events"]] == [
        (0.0, 5.0, "Male speech, man speaking", "/m/a"),
        (4.75, 9.99, "Bark", "/m/b"),
        (6.0, 7.0, "Male speech, man speaking", "/m/a"),
    ]
    assert skipped(manifest).keys() == {"t.tsv line 5", "t.tsv line 6", "t.tsv line 7"}


def test_a_folder_of_hugging_face_datasets_gives_the_bytes_that_went_in(tmp_path):
    datasets = pytest.importorskip("datasets")
    cells = {
        "picture": [{"bytes": png(1), "path": None}, {"bytes": picture(2, "JPEG"), "path": "x.jpg"}],
        "sound": [{"bytes": wav(n), "path": None} for n in range(2)],
        "text": ["one", "two"], "label": [1, 0], "n": [1, 2],
    }  # fmt: skip
    features = datasets.Features(
        picture=datasets.Image(decode=False), text=datasets.Value("string"),
        sound={"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        label=datasets.ClassLabel(names=["cat", "big_dog"]), n=datasets.Value("int64"),
    )  # fmt: skip
    data = datasets.Dataset.from_dict(cells, features=features)
    data = data.cast_column("sound", datasets.Audio(decode=False))  # to encode one would take torchcodec
    data.save_to_disk(str(tmp_path / "c"))
    manifest = build("datasets", tmp_path / "c", tmp_path / "out")
    samples = read(tmp_path / "out")
    assert samples["000000000"] == {
        "png": png(1), "wav": wav(0), "txt": "one", "cls": 1, "json": {"n": 1, "class": "big dog"},
    }  # fmt: skip
    assert samples["000000001"]["jpg"] == picture(2, "JPEG")
    assert manifest["counts"]["skipped"] == 0
    assert read_classes(tmp_path / "out", SPEC).classnames == ["cat", "big dog"]

    datasets.DatasetDict(train=data, test=data).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ConfigError, match="holds the splits train, test: choose one"):
        build("datasets", tmp_path / "d", tmp_path / "two")
    assert build("datasets", tmp_path / "d", tmp_path / "two", split="test")["counts"]["samples"] == 2
    with pytest.raises(DataError, match="save_to_disk"):
        build("datasets", tmp_path, tmp_path / "three")


def test_a_row_of_datasets_that_names_a_file_elsewhere_is_left_out(tmp_path):
    datasets = pytest.importorskip("datasets")
    put(tmp_path / "secret.png", png(9))
    cells = {
        "image": [{"bytes": png(1), "path": None}, {"bytes": None, "path": str(tmp_path / "secret.png")},
                  {"bytes": None, "path": "near.png"}, {"bytes": None, "path": None}],
        "captions": [["one", "two"], ["x"], ["y"], ["z"]],
    }  # fmt: skip
    datasets.Dataset.from_dict(cells).save_to_disk(str(tmp_path / "c"))  # of a picture it would take the bytes along
    info = json.loads((tmp_path / "c" / "dataset_info.json").read_text())
    info["features"]["image"] = {"_type": "Image"}
    put(tmp_path / "c" / "dataset_info.json", json.dumps(info))
    put(tmp_path / "c" / "near.png", png(2))
    told = skipped(build("datasets", tmp_path / "c", tmp_path / "out"))
    assert told.keys() == {"000000001", "000000003"} and "is no file below" in told["000000001"]
    samples = read(tmp_path / "out")
    assert samples["000000000"] == {"png": png(1), "txt": "one", "json": {"captions": ["one", "two"]}}
    assert samples["000000002"] == {"png": png(2), "txt": "y"}


@pytest.mark.parametrize(("package", "extra"), [("pyarrow", "parquet"), ("datasets", "datasets")])
def test_without_a_package_its_extra_is_named(pics, tmp_path, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    words = {"manifest": str(put(pics / "m.parquet", "x"))} if package == "pyarrow" else {}
    with pytest.raises(MissingExtra, match=rf"mmcl\[{extra}\]"):
        build("manifest" if words else "datasets", pics, tmp_path / "out", **words)


def test_a_corpus_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(NoUsableSamples, match="there is no such folder"):
        build("folder", tmp_path / "none", tmp_path / "out")
    (tmp_path / "c").mkdir()
    with pytest.raises(NoUsableSamples, match="no sample of folder there"):
        build("folder", tmp_path / "c", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_different_paths_give_different_keys_that_fit_a_tar():
    texts = ["a/b", "a__b", "a/b__c", "a__b/c", "ä/b", "ö/b", "v1.5", "v1-5", "x" * 300, "x" * 301, ""]
    keys = [make_key(text) for text in texts]
    assert len(set(keys)) == len(texts) and all(0 < len(key) <= 80 and "." not in key for key in keys)
    assert keys[0] == "a__b" and make_key("a_/b") != make_key("a/_b")
