"""The whole stage on files in a folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from preprocess_samples import REPO, Preprocess, png

from airloom.contract import DataCard, ExitCode, RejectedRow, StageInputError, StageRequest, StageResult, sha256_bytes
from airloom.contract.shards import read_split
from preprocessing.split import SPLITS


def rows_of(result: StageResult) -> dict[str, tuple[str, str]]:
    """source -> (split, label) of every packed row."""
    folder = result.outputs["dataset"].path
    return {row["source"]: (split, row["label"]) for split in SPLITS for row in read_split(folder, split).to_pylist()}


def rejected_of(result: StageResult) -> dict[str, str]:
    lines = (result.outputs["dataset"].path / "rejected.jsonl").read_text().splitlines()
    return {row.name: row.reason for row in map(RejectedRow.model_validate_json, lines)}


def test_every_file_is_packed_or_listed(preprocess: Preprocess, raw: Path) -> None:
    (raw / "a" / "empty.png").touch()
    result = preprocess()
    files = {path.relative_to(raw).as_posix() for path in raw.rglob("*.png")}
    assert rows_of(result).keys() | rejected_of(result).keys() == files
    assert len(rows_of(result)) == 180


def test_the_same_files_give_the_same_bytes(preprocess: Preprocess) -> None:
    assert preprocess("first").outputs["dataset"].digest == preprocess("second").outputs["dataset"].digest


def test_what_a_killed_try_left_does_not_stay(preprocess: Preprocess, tmp_path: Path) -> None:
    first = preprocess("first")
    left = tmp_path / "second" / "dataset"
    left.mkdir(parents=True)
    (left / "train-00007.parquet").write_bytes(b"half a shard")
    assert preprocess("second").outputs["dataset"].digest == first.outputs["dataset"].digest


def test_another_seed_gives_another_split(preprocess: Preprocess) -> None:
    assert rows_of(preprocess("first")) != rows_of(preprocess("second", seed=8))


def test_added_files_move_no_earlier_one(preprocess: Preprocess, raw: Path) -> None:
    before = rows_of(preprocess("first"))
    for number in range(1000, 1040):
        (raw / "b" / f"{number}.png").write_bytes(png(number))
    after = rows_of(preprocess("second"))
    assert len(after) == len(before) + 40
    assert {source: after[source] for source in before} == before


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a/empty.png", b"", "empty"),
        ("a/truncated.png", png(500)[:200], "truncated"),
        ("a/header.png", png(500)[:20], "truncated"),
        ("a/text.png", b"this is no picture at all", "not_an_image"),
        ("stray.png", png(500), "no_label"),
        ("a/deeper/x.png", png(500), "no_label"),
    ],
)
def test_a_bad_file_is_kept_aside_with_its_reason(
    preprocess: Preprocess, raw: Path, name: str, content: bytes, reason: str
) -> None:
    (raw / name).parent.mkdir(exist_ok=True)
    (raw / name).write_bytes(content)
    result = preprocess()
    assert rejected_of(result) == {name: reason}
    card = DataCard.read(result.outputs["dataset"].path / "card.json")
    assert card.rejected == {reason: 1}
    kept = [path.read_bytes() for path in result.outputs["rejected"].path.rglob("*") if path.is_file()]
    assert kept == [content]


def test_a_copy_under_the_same_label_is_dropped_once(preprocess: Preprocess, raw: Path) -> None:
    shutil.copy(raw / "a" / "000.png", raw / "a" / "copy.png")
    result = preprocess()
    assert rejected_of(result) == {"a/copy.png": "duplicate"}
    assert result.metrics["duplicates"] == 1


def test_copies_under_two_labels_are_all_kept_aside(preprocess: Preprocess, raw: Path) -> None:
    shutil.copy(raw / "a" / "000.png", raw / "b" / "mislabelled.png")
    assert rejected_of(preprocess()) == {"a/000.png": "conflicting_label", "b/mislabelled.png": "conflicting_label"}


def test_equal_pixels_in_another_format_are_the_same_picture(preprocess: Preprocess, raw: Path) -> None:
    from PIL import Image

    Image.open(raw / "a" / "000.png").save(raw / "a" / "000.bmp")
    assert rejected_of(preprocess()) == {"a/000.png": "duplicate"}


def test_the_card_counts_what_the_shards_hold(preprocess: Preprocess) -> None:
    result = preprocess(params={"rows_per_shard": 50})
    folder = result.outputs["dataset"].path
    card = DataCard.read(folder / "card.json")
    for split in SPLITS:
        table = read_split(folder, split)
        assert card.rows[split] == table.num_rows > 0
        labels = table["label"].to_pylist()
        assert card.rows_by_class[split] == {label: labels.count(label) for label in "abc"}
        for row in table.to_pylist():
            assert row["sha256"] == sha256_bytes(row["image"])
    assert len(list(folder.glob("train-*.parquet"))) > 1
    assert card.leaks == 0
    assert card.statistics["pixel_mean"] == pytest.approx(0.5, abs=0.01)
    assert card.size_bytes == sum(path.stat().st_size for path in folder.glob("*.parquet"))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"image_sise": 28}, "image_sise"),
        ({"image_size": 2}, "found 2"),
        ({"split": {"train": 0.5, "validation": 0.2, "test": 0.2}}, "add up to 0.9"),
    ],
)
def test_a_wrong_parameter_is_named(preprocess: Preprocess, params: dict[str, object], said: str) -> None:
    with pytest.raises(StageInputError, match=said):
        preprocess(params=params)


def test_files_without_label_folders_are_refused_as_a_whole(preprocess: Preprocess, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(5):
        (flat / f"{number}.png").write_bytes(png(number))
    with pytest.raises(StageInputError, match="'no_label': 5"):
        preprocess(inputs={"folder": flat})


def test_the_command_line_writes_a_result_and_exits_with_the_reason(raw: Path, tmp_path: Path) -> None:
    request = StageRequest(
        pipeline="test",
        run_id="run",
        stage="preprocess",
        commit="0" * 40,
        params={"image_size": "large"},
        inputs={"folder": raw},
        outputs={"dataset": tmp_path / "dataset"},
    )
    request.write(tmp_path / "request.json")
    command = [sys.executable, "main.py", "preprocess", "--request", tmp_path / "request.json"]
    done = subprocess.run([*command, "--result", tmp_path / "result.json"], cwd=REPO, check=False)
    assert done.returncode == ExitCode.BAD_DATA
    error = json.loads((tmp_path / "result.json").read_text())["error"]
    assert "stages.preprocess.params.image_size" in error
    assert "'large'" in error
