"""Files between the platform and stages: whole or not there, and wrong ones are named."""

from __future__ import annotations

import json
import math
import os
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from airloom.contract import (
    DataCard,
    ExitCode,
    Frozen,
    Output,
    Stage,
    StageInputError,
    StageRequest,
    StageResult,
    run_stage_main,
    sha256_tree,
)
from airloom.contract.model import load_predictor
from airloom.contract.plan import safe_run_id
from airloom.contract.shards import iterate_split, read_split, shard_paths, write_shards
from airloom.errors import AirloomError, ContractError, UnavailableError


class Note(Frozen):
    text: str
    number: float = 0.0


# Frozen


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    Note(text="0" * 50_000).write(path)
    stop = threading.Event()
    faults: list[str] = []

    def read() -> None:
        while not stop.is_set():
            text = Note.read(path).text
            if len(set(text)) != 1 or len(text) != 50_000:
                faults.append(text[:20])

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 60):
        Note(text=str(number % 10) * 50_000).write(path)
    stop.set()
    reader.join()
    assert faults == []
    assert [found.name for found in tmp_path.iterdir()] == ["note.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note.json"
    Note(text="old").write(path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Note(text="new").write(path)
    assert Note.read(path).text == "old"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no such file"),
        ("", "the whole file"),
        ("{", "the whole file"),
        ("[]", "the whole file"),
        ('{"number": 1}', "text"),
        ('{"text": 1}', "text"),
        ('{"text": "a", "colour": "red"}', "colour"),
        ("\ufeff\x00", "the whole file"),
    ],
)
def test_a_file_that_is_no_such_model_is_named(tmp_path: Path, content: str | None, named: str) -> None:
    path = tmp_path / "note.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ContractError) as caught:
        Note.read(path)
    assert str(path) in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 1e-300])
def test_figures_that_json_has_no_word_for_read_back(tmp_path: Path, number: float) -> None:
    Note(text="x", number=number).write(tmp_path / "note.json")
    found = Note.read(tmp_path / "note.json").number
    assert found == number or (math.isnan(found) and math.isnan(number))


def test_a_model_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Note(text="a").text = "b"  # type: ignore[misc]


# Digests


def tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_equal_trees_have_one_digest_wherever_and_whenever_they_were_made(tmp_path: Path) -> None:
    first = tree(tmp_path / "a", {"x/1": b"one", "2": b"two"})
    second = tree(tmp_path / "deep" / "b", {"2": b"two", "x/1": b"one"})
    os.utime(second / "2", (1, 1))
    (second / "2").chmod(0o600)
    (second / "empty").mkdir()
    assert sha256_tree(first) == sha256_tree(second)


@pytest.mark.parametrize(
    "files",
    [
        {"x/1": b"one", "2": b"two!"},
        {"x/1": b"one", "3": b"two"},
        {"1": b"one", "2": b"two"},
        {"x/1": b"one"},
        {"x/1": b"one", "2": b"two", "3": b""},
        {"x/1": b"two", "2": b"one"},
    ],
)
def test_any_other_tree_has_another_digest(tmp_path: Path, files: dict[str, bytes]) -> None:
    first = tree(tmp_path / "a", {"x/1": b"one", "2": b"two"})
    assert sha256_tree(tree(tmp_path / "b", files)) != sha256_tree(first)


def test_an_output_measures_its_folder(tmp_path: Path) -> None:
    output = Output.of(tree(tmp_path / "a", {"x/1": b"one", "2": b"four"}))
    assert (output.files, output.size_bytes) == (2, 7)


# Run ids


def test_run_ids_become_names_that_differ() -> None:
    given = [
        "manual__2026-11-21T04:35:10.123456+00:00",
        "manual__2026-11-21T04-35-10.123456-00-00",
        "manual__2026-11-21T04:35:10.123456-00:00",
        "../../etc",
        "..",
        ".",
        "-",
        "é",
        "ü",
        "plain_1.2-3",
        "x" * 300,
        "x" * 301,
    ]
    names = [safe_run_id(run_id) for run_id in given]
    assert len(set(names)) == len(given)
    assert safe_run_id("plain_1.2-3") == "plain_1.2-3"
    for name in names:
        assert name
        assert len(name) <= 120
        assert name not in {".", ".."}
        assert not set(name) & set("/:+ \\")


# Entry point of stages


def call(tmp_path: Path, function: Any, *, stage: str = "train", request: str | None = None) -> tuple[int, StageResult]:
    path = tmp_path / "request.json"
    path.write_text(
        request
        if request is not None
        else StageRequest(pipeline="digits", run_id="r", stage=Stage.TRAIN, commit="0" * 40).model_dump_json()
    )
    stages = {Stage.TRAIN: function, Stage.EVALUATE: function}
    code = run_stage_main(stages, [stage, "--request", str(path), "--result", str(tmp_path / "result.json")])
    return code, StageResult.read(tmp_path / "result.json")


def raising(error: Exception) -> Any:
    def stage(_: StageRequest) -> StageResult:
        raise error

    return stage


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StageInputError("column 'label' is missing"), ExitCode.BAD_DATA),
        (UnavailableError("MLflow does not answer"), ExitCode.TEMPORARY),
        (AirloomError("the disk is odd"), ExitCode.FAILED),
        (ConnectionResetError("peer is gone"), ExitCode.TEMPORARY),
        (TimeoutError("too slow"), ExitCode.TEMPORARY),
        (ZeroDivisionError("division by zero"), ExitCode.FAILED),
        (MemoryError("no memory"), ExitCode.FAILED),
    ],
)
def test_each_kind_of_failure_has_its_exit_code_and_says_why(tmp_path: Path, error: Exception, code: int) -> None:
    found, result = call(tmp_path, raising(error))
    assert found == code
    assert result.status == "failed"
    assert str(error) in str(result.error)


@pytest.mark.parametrize(
    ("request_text", "stage", "said"),
    [
        ("{", "train", "not a valid StageRequest"),
        ("{}", "train", "pipeline"),
        (None, "evaluate", "for stage 'train', not 'evaluate'"),
    ],
)
def test_an_unusable_request_is_refused_before_the_stage_runs(
    tmp_path: Path, request_text: str | None, stage: str, said: str
) -> None:
    code, result = call(tmp_path, raising(AssertionError("ran")), stage=stage, request=request_text)
    assert code == ExitCode.BAD_REQUEST
    assert said in str(result.error)


def test_a_missing_request_is_refused(tmp_path: Path) -> None:
    arguments = ["train", "--request", str(tmp_path / "none.json"), "--result", str(tmp_path / "result.json")]
    assert run_stage_main({Stage.TRAIN: raising(AssertionError())}, arguments) == ExitCode.BAD_REQUEST
    assert "none.json" in str(StageResult.read(tmp_path / "result.json").error)


def test_a_stage_that_ends_well_leaves_its_result(tmp_path: Path) -> None:
    def stage(request: StageRequest) -> StageResult:
        return StageResult(stage=request.stage, status="ok", metrics={"a": 1.5}, started_at=1, finished_at=2)

    code, result = call(tmp_path, stage)
    assert (code, result.metrics) == (0, {"a": 1.5})


def test_a_stage_that_is_not_in_the_repo_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        run_stage_main({Stage.TRAIN: raising(AssertionError())}, ["serve", "--request", "r", "--result", "s"])
    assert caught.value.code == 2


# Models


def model(folder: Path, name: str, *, entry: str = "toy.predictor:load", facts: str = "") -> Path:
    """An artifact whose package is called `toy`, as every other one's."""
    code = textwrap.dedent(
        f"""
        from toy.helper import NAME

        class Toy:
            def decode(self, content): return content
            def transform(self, sample): return sample
            def predict(self, batch): return batch
            def encode(self, output): return {{"name": NAME, "folder": self.folder}}
            def embed(self, batch): return batch
            def explain(self, sample): return b""

        def load(folder):
            toy = Toy()
            toy.folder = str(folder)
            return toy

        def nothing(folder):
            return {facts!r}
        """
    )
    card = {"entry": entry, "packages": ["toy"], "task": "classification"}
    return tree(
        folder,
        {
            "model.json": json.dumps(card).encode(),
            "code/toy/__init__.py": b"",
            "code/toy/helper.py": f"NAME = {name!r}\n".encode(),
            "code/toy/predictor.py": code.encode(),
        },
    )


def test_two_models_with_one_package_name_live_side_by_side(tmp_path: Path) -> None:
    first, second = model(tmp_path / "a", "first"), model(tmp_path / "b", "second")
    _, one = load_predictor(first)
    _, two = load_predictor(second)
    _, again = load_predictor(first)
    names = [predictor.encode(None)["name"] for predictor in (one, two, again)]  # type: ignore[arg-type]
    assert names == ["first", "second", "first"]


def test_loading_a_model_leaves_its_folder_and_the_import_path_alone(tmp_path: Path) -> None:
    folder = model(tmp_path / "a", "first")
    before, path, writes = sha256_tree(folder), list(sys.path), sys.dont_write_bytecode
    load_predictor(folder)
    assert (sha256_tree(folder), sys.path, sys.dont_write_bytecode) == (before, path, writes)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("toy.nowhere:load", "cannot be loaded from its own code"),
        ("toy.predictor:missing", "cannot be loaded from its own code"),
        ("toy.predictor:nothing", "is no Predictor"),
        ("no entry", "entry"),
    ],
)
def test_an_artifact_that_is_no_model_is_refused(tmp_path: Path, entry: str, said: str) -> None:
    with pytest.raises(ContractError, match=said):
        load_predictor(model(tmp_path / "a", "x", entry=entry))


def test_a_folder_without_model_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"model\.json"):
        load_predictor(tmp_path)


# Shards


def rows(number: int) -> Any:
    import pyarrow as pa

    ids = [f"row-{index:05d}" for index in range(number)]
    return pa.table({"id": ids, "image": [name.encode() * 7 for name in ids], "label": [name[-1] for name in ids]})


@pytest.mark.parametrize(("number", "shards"), [(0, 1), (1, 1), (999, 1), (1000, 1), (1001, 2), (2500, 3)])
def test_shards_give_back_their_rows_in_order(tmp_path: Path, number: int, shards: int) -> None:
    table = rows(number)
    paths = write_shards(tmp_path, "train", table)
    assert len(paths) == shards
    assert read_split(tmp_path, "train").to_pydict() == table.to_pydict()
    assert sum(part.num_rows for part in iterate_split(tmp_path, "train")) == number
    assert read_split(tmp_path, "train", ["label"]).column_names == ["label"]


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", "train", rows(1500))
    write_shards(tmp_path / "b", "train", rows(1500))
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b")


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, "train", rows(3))
    with pytest.raises(ContractError, match="'test'"):
        shard_paths(tmp_path, "test")


def test_a_card_counts_rows_and_rejected_ones() -> None:
    card = DataCard(rows={"train": 7, "test": 3}, rejected={"empty": 2, "truncated": 1})
    assert (card.total_rows, card.total_rejected) == (10, 3)
