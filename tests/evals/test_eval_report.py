"""What is written: JSON that any parser reads, a table, and curves of runs that ended badly too."""

import json
import math
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmcl.errors import DataError, MissingExtra
from mmcl.types import Score
from mmcl_evals import TaskResult, draw_curves, markdown_table, write_report, write_results

RESULT = TaskResult(
    name="wds/esc50",
    task="zeroshot_classification",
    modality="audio-text",
    metrics={
        "acc1": Score(value=0.512, n=400, chance=0.02, low=0.46, high=0.56),
        "acc1_held_out": Score(value=math.nan, n=0, chance=0.02, low=0.0, high=1.0),
    },
    main_metric="acc1",
    seconds=12.34567,
    details={"n_classes": 50, "templates_sha256": "abc"},
)
MODEL = {"name": "mmcl-b", "pretrained": "step_120000", "weights_sha256": "12", "samples_seen": 1.2e9, "step": 120000}


def no_constant(word: str) -> float:
    raise AssertionError(f"{word} is no JSON")


def write_run(path: Path, steps: int = 60) -> Path:
    tasks = {
        "shapes/acc1": (0.9, 0.02),
        "shapes/acc1_held_out": (0.4, 0.02),
        "sounds/acc1": (0.7, 0.1),
        "pairs/image_to_text_r1": (0.6, 0.004),
        "pairs/image_to_text_r5": (0.8, 0.02),
        "pairs/text_to_image_r1": (0.55, 0.004),
        "scene_foils/attribute": (0.8, 0.5),
        "scene_foils/relation": (0.55, 0.5),
    }
    lines = []
    for step in range(1, steps + 1):
        decay = math.exp(-step / 20)
        lines.append(
            {
                "step": step * 10,
                "loss": 4 * decay + 0.5,
                "loss_image_text": 4 * decay,
                "loss_audio_text": 3 * decay + 0.2,
            }
            | {"loss_image_audio": 4.5 * decay + 0.9, "lr": 1e-3 * min(step / 10, 1), "scale_image_text": 14 + step / 2}
            | {"scale_audio_text": 14 + step / 3, "pairs_per_second": 1234.5}
        )
        if step % 15 == 0:
            lines.append({"step": step * 10} | {f"eval/{task}": top * (1 - decay) for task, (top, _) in tasks.items()})
            lines[-1] |= {f"eval_chance/{task}": chance for task, (_, chance) in tasks.items()}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_result_is_strict_json_by_schema_v1(tmp_path):
    (path,) = write_results(
        [RESULT], tmp_path / "r", model=MODEL, data={"split": "test", "seen": math.inf}, env={"torch": "2"}
    )
    assert path == tmp_path / "r" / "zeroshot_classification__wds_esc50.json"
    found = json.loads(path.read_text(), parse_constant=no_constant)
    about = found.pop("mmcl")
    assert found == {
        "dataset": "wds/esc50",
        "model": "mmcl-b",
        "pretrained": "step_120000",
        "task": "zeroshot_classification",
        "language": "en",
        "metrics": {"acc1": 0.512, "acc1_held_out": None},
    }
    assert about == {
        "schema_version": 1,
        "main_metric": "acc1",
        "higher_is_better": True,
        "modality": "audio-text",
        "n": 400,
        "n_classes": 50,
        "ci95": {"acc1": [0.46, 0.56], "acc1_held_out": [0.0, 1.0]},
        "ci_method": "wilson",
        "chance": 0.02,
        "by_metric": {"acc1": {"n": 400, "chance": 0.02}, "acc1_held_out": {"n": 0, "chance": 0.02}},
        "preprocess_sha256": None,
        "model": {"weights_sha256": "12", "samples_seen": 1.2e9, "step": 120000},
        "data": {"split": "test", "seen": None, "templates_sha256": "abc"},
        "env": {"torch": "2"},
        "seconds": 12.346,
    }
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_table_shows_chance_and_interval_beside_each_score(tmp_path):
    rows = markdown_table([RESULT]).splitlines()
    assert rows[0] == "| task | metric | score | chance | times chance | 95 % interval | n |"
    assert rows[2] == "| wds/esc50 | acc1 | 0.512 | 0.020 | 25.6 | 0.460 to 0.560 | 400 |"
    assert rows[3] == "| wds/esc50 | acc1_held_out | - | 0.020 | - | 0.000 to 1.000 | 0 |"


def test_a_report_says_how_to_make_it_again_and_links_its_plots(tmp_path):
    plots = [tmp_path / "plots" / "curves.png", tmp_path / "plots" / "curves.svg"]
    path = write_report([RESULT], tmp_path / "out", title="Tiny", reproduce="mmcl eval tiny", plots=plots)
    text = path.read_text()
    assert path.name == "report.md" and text.startswith("# Tiny\n") and markdown_table([RESULT]) in text
    assert "mmcl eval tiny" in text and "![curves.png](../plots/curves.png)" in text


def colours(png: Path) -> int:
    with Image.open(png) as image:
        assert image.width > 1000 and image.height > 400
        return len(image.convert("RGB").getcolors(1 << 24) or [])


def test_curves_are_drawn_as_png_and_svg_and_a_torn_line_is_left_out(tmp_path):
    path = write_run(tmp_path / "metrics.jsonl")
    png, svg = draw_curves(path, tmp_path / "plots" / "run1.5")
    assert (png.name, svg.name) == ("run1.5.png", "run1.5.svg")
    assert colours(png) > 100
    whole = svg.read_text()
    assert whole.startswith("<?xml") and "</svg>" in whole
    with path.open("ab") as file:
        file.write(b'{"step": 610, "loss": 0.1, "l\xc3')
    assert draw_curves(path, tmp_path / "torn.svg")[1].read_text() == whole


def test_steps_that_a_resumed_run_took_again_count_as_it_took_them(tmp_path):
    from mmcl_evals.curves import read_curves

    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step":1,"loss":3}\n{"step":3,"loss":9}\n{"step":2,"loss":2}\n{"step":3,"loss":1,"run":"b"}\n[]\n'
    )
    assert read_curves(path) == {"loss": {1: 3.0, 2: 2.0, 3: 1.0}}


def test_a_single_line_and_values_that_are_not_finite_are_drawn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1,"loss":NaN,"lr":0.1}\n{"step":2,"loss":null}\n{"step":3,"loss":1.0}\n')
    assert colours(draw_curves(path, tmp_path / "one")[0]) > 20


@pytest.mark.parametrize("content", ["", "\n", '{"step": 1', '{"loss": 1.0}\n', '{"step": 1}\n'])
def test_a_file_without_a_step_to_draw_is_a_data_error(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match="holds no line"):
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "none")
    with pytest.raises(DataError, match="no such file"):
        draw_curves(tmp_path / "absent.jsonl", tmp_path / "none")


def test_without_matplotlib_the_message_names_the_extra(tmp_path, monkeypatch):
    path = write_run(tmp_path / "metrics.jsonl", steps=3)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"drawing the curves needs .*mmcl\[report\]"):
        draw_curves(path, tmp_path / "none")
