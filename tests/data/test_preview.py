"""The page holds all it needs, shows what is in the shards, and runs nothing that the shards say."""

import base64
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from data_cases import png, sample, write
from PIL import Image

from mmcl.errors import ConfigError, ShardMissing
from mmcl_data.preview import POLICY, write_preview

CHROMIUM = shutil.which("chromium")
HOSTILE = (
    """</p></style></title><script>parent.ran = window.ran = 1</script><img src=x onerror="window.ran=1"> & 'q' "w\""""
)


class Page(html.parser.HTMLParser):
    """What a browser makes of the page: elements with their attributes, and the text in each."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append((self.elements[-1][0] if self.elements else "", data))

    def all(self, tag: str, style: str | None = None) -> list[dict[str, str | None]]:
        return [held for name, held in self.elements if name == tag and style in (None, held.get("class"))]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def content(uri: str | None, kind: str) -> io.BytesIO:
    assert uri is not None and uri.startswith(f"data:{kind};base64,")
    return io.BytesIO(base64.b64decode(uri.partition(",")[2], validate=True))


def tone(hertz: float, seconds: float, rate: int = 16_000) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, 0.5 * np.sin(np.arange(round(rate * seconds)) * 2 * np.pi * hertz / rate), rate, format="WAV")
    return out.getvalue()


def noise(seconds: float, rate: int) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(0).uniform(-1, 1, (round(rate * seconds), 2)), rate, format="WAV")
    return out.getvalue()


def page_of(tmp_path: Path, rows, per_shard: int = 10, **options) -> tuple[Page, dict[str, int]]:
    source = write(tmp_path / "set", rows, per_shard)
    found = write_preview([source], tmp_path / "page.html", **options)
    return Page(tmp_path / "page.html"), found


def test_each_sample_is_one_figure_with_picture_spectrogram_player_and_caption(tmp_path):
    rows = [sample(number, png=png(number, 40), wav=tone(1000, 0.5 + number)) for number in range(3)]
    page, found = page_of(tmp_path, rows, 2)
    assert (found["samples"], found["problems"]) == (3, 0) and len(page.all("figure")) == 3
    assert found["bytes"] == (tmp_path / "page.html").stat().st_size
    for number, held in enumerate(page.all("img", "small")):
        with Image.open(content(held["src"], "image/png")) as image:
            assert image.size == (40, 40) and image.getpixel((5, 5)) == (number, 0, 7)
        assert held["alt"] == f"number {number}"
    for number, held in enumerate(page.all("audio")):
        wave, rate = soundfile.read(content(held["src"], "audio/flac"))
        assert len(wave) == (0.5 + number) * rate and "controls" in held and held["aria-label"]
        assert np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave) == 1000
    for held in page.all("img", "spectrogram"):
        with Image.open(content(held["src"], "image/png")) as image:
            rows_of_light = np.asarray(image.convert("L")).mean(axis=1)
        assert 27 <= 80 - rows_of_light.argmax() <= 29  # 1 kHz is 1000 mel, and 8 kHz 2840
    assert page.text("h3") == ["00000", "00001", "00002"]
    assert {"number 0", "number 1", "number 2"} <= set(page.text("p"))
    assert [text for text in page.text("p") if "byte" in text][::2] == [
        "000000.tar, byte 0",
        f"000000.tar, byte {offset_of(tmp_path, '00001')}",
        "000001.tar, byte 0",
    ]


def offset_of(tmp_path, key):
    with tarfile.open(tmp_path / "set" / "000000.tar") as tar:
        return next(member.offset for member in tar if member.name.startswith(key))


def test_the_page_needs_nothing_else_and_says_so(tmp_path):
    page, _ = page_of(tmp_path, [sample(number) for number in range(3)])
    assert {"http-equiv": "Content-Security-Policy", "content": POLICY} in page.all("meta")
    assert page.elements[0] == ("html", {"lang": "en"}) and page.all("h1") and page.all("main")
    for tag, held in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form", "base", "a", "svg")
        assert not [name for name in held if name.startswith("on") or name in ("href", "srcset", "style", "poster")]
        assert held.get("src") is None or str(held["src"]).startswith(("data:image/", "data:audio/"))
        assert tag != "img" or held["alt"]
    assert "url(" not in " ".join(page.text("style")) and "@import" not in " ".join(page.text("style"))
    assert all("://" not in str(value) for _, held in page.elements for value in held.values())


def test_text_from_the_data_is_shown_and_never_markup(tmp_path):
    facts = {"caption": HOSTILE, HOSTILE: HOSTILE, "negatives": [HOSTILE], "captions": {HOSTILE: "\ud800\0\x1b"}}
    rows = [{"__key__": "<b onload=x>", "png": png(1), "txt": (HOSTILE + "\x07").encode()}, sample(2)]
    rows[1]["json"] = json.dumps(facts).encode()
    page, found = page_of(tmp_path, rows)
    clean, _ = page_of(tmp_path / "clean", [sample(1, wav=None, json=None), sample(2)])
    kinds = {tag for tag, _ in page.elements} - {"h4", "ul", "li", "small", "span"}
    assert found["problems"] == 0 and kinds == {tag for tag, _ in clean.elements}
    assert page.text("h3")[0] == "<b onload=x>"
    assert HOSTILE + "\ufffd" in page.text("p") and HOSTILE in page.text("span")
    assert page.all("img", "small")[0]["alt"] == HOSTILE + "\ufffd"
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", (tmp_path / "page.html").read_text())


def test_a_negative_is_shown_as_its_caption_under_its_operator(tmp_path):
    negatives = [{"operator": "order", "caption": "a cat, then a dog"}, {"caption": "a cow"}, {"operator": "alone"}]
    page, _ = page_of(tmp_path, [sample(0, json=json.dumps({"negatives": negatives}).encode())])
    assert list(zip(page.text("small"), page.text("span"), strict=True)) == [
        ("negatives.order", "a cat, then a dog"),
        ("negatives", "a cow"),
        ("negatives.operator", "alone"),
    ]


def test_captions_negatives_and_classes_of_the_json_are_shown_with_their_place(tmp_path):
    facts = {
        "caption": "number 0",
        "captions": {"scene": "a cat", "sound": ["purrs", "meows"]},
        "foils": {"scene": {"swap": "a dog"}},
        "hard_negatives": ["a cow"],
        "n": 3,
    }
    page, _ = page_of(tmp_path, [sample(0, json=json.dumps(facts).encode(), cls=b"42")])
    pairs = list(zip(page.text("small"), page.text("span"), strict=True))
    assert pairs == [
        ("captions.scene", "a cat"),
        ("captions.sound", "purrs"),
        ("captions.sound", "meows"),
        ("foils.scene.swap", "a dog"),
        ("hard_negatives", "a cow"),
    ]
    assert page.text("h4") == ["Captions of the json", "Negatives"] and "Class 42" in page.text("p")
    assert json.loads(page.text("pre")[0]) == facts


def test_problems_are_shown_in_place_of_what_they_spoil(tmp_path):
    rows = [sample(0, png=b"no picture"), sample(1, wav=None, json=b"[]"), sample(2), sample(3)]
    source = write(tmp_path / "set", rows, 2)
    os.truncate(tmp_path / "set" / "000001.tar", 700)
    found = write_preview([source], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert (found["samples"], found["problems"]) == (2, 3) and len(page.all("figure")) == 2
    told = [text for text in page.text("p") if text.startswith("Problem: ")]
    assert told[0].startswith(f"Problem: {source}/000001.tar: damaged at byte 700")
    assert told[1] == "Problem: png: not a readable JPEG, PNG or WebP image: no such header"
    assert told[2] == "Problem: json: the json member holds a list, not an object"
    assert "number 0" in page.text("p") and len(page.all("audio")) == 1


def test_samples_are_drawn_evenly_and_by_the_seed_alone(tmp_path):
    sizes = (1, 20, 20, 5)
    for shard, size in enumerate(sizes):
        write(tmp_path / str(shard), [sample(number, prefix=f"{shard}-") for number in range(size)], 100)
    out = tmp_path / "page.html"

    def keys(specs, **options):
        write_preview([str(tmp_path / spec) for spec in specs], out, **options)
        return Page(out).text("h3")

    drawn = keys("0123", samples=16)
    assert [sum(key.startswith(f"{shard}-") for key in drawn) for shard in range(4)] == [1, 5, 5, 5]
    assert drawn == sorted(set(drawn))
    first = out.read_bytes()
    assert keys("0123", samples=16) == drawn and out.read_bytes() == first
    assert keys("0123", samples=16, seed=1) != drawn
    assert len(keys("0123", samples=1000)) == sum(sizes)
    assert [key[0] for key in keys("0123", samples=2)] in (["0", "2"], ["0", "3"], ["1", "2"], ["1", "3"])


def test_a_large_sample_adds_a_bounded_number_of_bytes(tmp_path):
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 2000, 3), dtype=np.uint8)).save(picture, "PNG")
    facts = json.dumps({"captions": ["word " * 1000] * 100, "more": "x" * 100_000}).encode()
    rows = [sample(0, png=picture.getvalue(), wav=noise(12, 48_000), txt=b"word " * 5000, json=facts)]
    page, found = page_of(tmp_path, rows)
    assert found["problems"] == 0 and 400_000 < found["bytes"] < 600_000
    (held,) = page.all("img", "large")
    assert (held["width"], held["height"]) == ("320", "144")
    wave, rate = soundfile.read(content(page.all("audio")[0]["src"], "audio/flac"))
    assert (len(wave), rate) == (160_000, 16_000)
    assert any("12.00 s, of which the first 10 s are here" in text for text in page.text("p"))
    page, found = page_of(tmp_path / "short", rows, seconds=0.5)
    assert found["bytes"] < 250_000


@pytest.mark.parametrize("options", [{"samples": 0}, {"samples": 1001}, {"seconds": 0}, {"seconds": 61}])
def test_a_page_without_end_is_refused(tmp_path, options):
    with pytest.raises(ConfigError, match=r"expected 1\.\.1000"):
        page_of(tmp_path, [sample(0)], **options)


def test_a_page_that_cannot_be_made_is_an_error(tmp_path):
    with pytest.raises(ShardMissing):
        write_preview([str(tmp_path)], tmp_path / "page.html")
    with pytest.raises(ConfigError, match="cannot be written there"):
        write_preview([write(tmp_path / "set", [sample(0)])], tmp_path / "no" / "page.html")


WATCH = """<!doctype html><title>waiting</title><iframe src="{page}" width="400" height="2000"></iframe><script>
window.onload = async () => {{
  const inside = frames[0], page = inside.document;
  const sounds = [...page.querySelectorAll("audio")].map(sound => new Promise(told => {{
    if (sound.readyState) told(sound.duration);
    sound.onloadedmetadata = () => told(sound.duration);
    sound.onerror = () => told(sound.error.message);
  }}));
  const found = {{
    images: [...page.images].map(image => image.complete && image.naturalWidth),
    sounds: await Promise.all(sounds),
    ran: inside.ran === undefined && window.ran === undefined ? 0 : 1,
    sideways: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    dark: inside.matchMedia("(prefers-color-scheme: dark)").matches,
    background: inside.getComputedStyle(page.querySelector("article")).backgroundColor,
  }};
  document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").textContent = JSON.stringify(found);
}};
</script>"""


def browse(page: Path, *flags: str) -> dict:
    """What a real browser makes of `page`, in a frame of 400 pixels, watched from the page around it."""
    watch = page.with_name("watch.html")
    watch.write_text(WATCH.format(page=page.name))
    flags = ("--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--virtual-time-budget=20000", *flags)
    profile = f"--user-data-dir={page.with_name('profile')}"
    command = [CHROMIUM or "", "--headless", *flags, profile, "--dump-dom", watch.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(re.search(r"<pre>(.*)</pre>", done.stdout)[1])


@pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="chromium is not installed")
def test_a_browser_shows_every_picture_knows_every_length_and_runs_nothing(tmp_path):
    rows = [sample(number, wav=tone(440, 0.25 * (number + 1)), txt=HOSTILE.encode()) for number in range(3)]
    rows.append(sample(3, png=png(3, 500), txt=b"word" * 200, wav=noise(11, 44_100)))
    page_of(tmp_path, rows)
    found = browse(tmp_path / "page.html")
    assert found["images"][::2] == [8, 8, 8, 320] and all(found["images"])
    assert found["sounds"] == [0.25, 0.5, 0.75, 10]
    assert (found["ran"], found["sideways"], found["dark"]) == (0, 0, False)
    # the policy holds by itself, were anything ever to slip through
    markup = (tmp_path / "page.html").read_text()
    script = "<script>parent.ran = 1</script>"
    (tmp_path / "page.html").write_text(markup.replace("<h1>", f"{script}<h1>"))
    dark = browse(tmp_path / "page.html", "--blink-settings=preferredColorScheme=0")
    assert (dark["ran"], dark["dark"]) == (0, True) and dark["background"] != found["background"]
    unguarded = re.sub(r'<meta http-equiv[^>]*Policy"[^>]*>', "", markup)
    (tmp_path / "page.html").write_text(unguarded.replace("<h1>", f"{script}<h1>"))
    assert browse(tmp_path / "page.html")["ran"] == 1
