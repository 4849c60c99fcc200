"""Pipeline YAMLs: a wrong one names file, line, key, value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from airloom.contract.digest import sha256_json
from airloom.contract.enums import Stage
from airloom.errors import ConfigError, ContractError
from airloom.spec import PipelineSpec, load_pipeline, load_pipelines, parse_pipeline
from airloom.spec.units import parse_duration, parse_size
from tests.conftest import ROOT

TEXT = """\
name: digits
description: Recognise handwritten digits.
owner: ds-team
tags: [vision, demo]
task: classification
runner: process

source:
  uri: s3://raw/digits/

stages:
  preprocess:
    repo: de_datapreprocessing
    resources: {cpus: 2, memory: 1GiB, timeout: 10m}
    params:
      image_size: 28
    seed: 7
  train:
    repo: ds_mlmodeling
    resources: {cpus: 2, memory: 3GiB, timeout: 30m}
    params:
      epochs: 6
  evaluate:
    repo: ds_mlmodeling
  serve:
    repo: ds_modelserving

validation:
  min_rows: 4000
  max_rejected_fraction: 0.05

gate:
  thresholds:
    accuracy: {min: 0.93}
  champion: {metric: accuracy, max_regression: 0.005}
  approval: false

deploy:
  target: process
  version: "1.0"
  canary:
    steps: [10, 50, 100]
    step_time: 3s
  max_upload: 1MiB

monitor:
  schedule: "0 6 * * 1"
"""
PATH = Path("configs/digits.yaml")


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), start=1) if part in line)


# what stands in the file, what is put there, what the message must hold beside file:line
WRONG = [
    ("task: classification", "task: clasification", ["task", "'clasification'", "'classification'", "'detection'"]),
    ("runner: process", "runner: proces", ["runner", "'proces'", "'process' or 'docker'"]),
    ("owner: ds-team", "owner: 7", ["owner", "string", "7"]),
    ("owner: ds-team", "owner: ''", ["owner", "at least 1 character"]),
    ("uri: s3://raw/digits/", "uri: /data/digits", ["source.uri", "'/data/digits'"]),
    ("uri: s3://raw/digits/", "uri: s3://raw/digits", ["source.uri", "'s3://raw/digits'"]),
    ("memory: 1GiB", "memory: 1GB", ["stages.preprocess.resources.memory", "'1GB'", "MiB"]),
    ("memory: 1GiB", "memory: -5", ["stages.preprocess.resources.memory", "-5"]),
    ("memory: 1GiB", "memory: 1GiB, shm: 64m", ["stages.preprocess.resources.shm", "'64m'", "MiB"]),
    ("memory: 1GiB", "memory: 1GiB, tmp: 0", ["stages.preprocess.resources.tmp", "0"]),
    ("timeout: 10m}", "timeout: soon}", ["stages.preprocess.resources.timeout", "'soon'", "15m"]),
    ("cpus: 2, memory: 1GiB", "cpus: 0, memory: 1GiB", ["stages.preprocess.resources.cpus", "greater than 0"]),
    ("steps: [10, 50, 100]", "steps: [50, 10, 100]", ["deploy.canary", "rising", "[50, 10, 100]"]),
    ("steps: [10, 50, 100]", "steps: [10, 50]", ["deploy.canary", "up to 100"]),
    ("steps: [10, 50, 100]", "steps: []", ["deploy.canary", "rising"]),
    ("step_time: 3s", "step_time: yes", ["deploy.canary.step_time", "True"]),
    ("accuracy: {min: 0.93}", "accuracy: {min: 0.9, max: 0.5}", ["gate.thresholds.accuracy", "min 0.9 is above max"]),
    ("accuracy: {min: 0.93}", "accuracy: {}", ["gate.thresholds.accuracy", "min, max or both"]),
    ("accuracy: {min: 0.93}", "accuracy: 0.93", ["gate.thresholds.accuracy", "0.93"]),
    ("max_regression: 0.005", "max_regression: -1", ["gate.champion.max_regression", "-1"]),
    ("max_rejected_fraction: 0.05", "max_rejected_fraction: 5", ["validation.max_rejected_fraction", "5"]),
    ('version: "1.0"', "version: 1.0", ["deploy.version", "string", "1.0"]),
    ('version: "1.0"', 'version: "1.0.0"', ["deploy.version", "'1.0.0'"]),
    ("target: process", "target: docker", ["deploy.target 'docker'", "runner 'docker'"]),
    ("repo: de_datapreprocessing", "repo: ../evil", ["stages.preprocess.repo", "'../evil'"]),
    ("approval: false", "aproval: false", ["gate.aproval", "no such key"]),
    ("  preprocess:", "  preproces:", ["stages.preproces", "'preprocess'"]),
    ('schedule: "0 6 * * 1"', "schedule: every week", ["monitor.schedule", "'every week'", "five fields"]),
    ('schedule: "0 6 * * 1"', 'schedule: "0 25 * * 1"', ["monitor.schedule", "'0 25 * * 1'"]),
    ('schedule: "0 6 * * 1"', 'schedule: "@weekly"', ["monitor.schedule", "'@weekly'"]),
    ("runner: process", "runner: kubernetes", ["runner", "'kubernetes'", "'process' or 'docker'"]),
    ("target: process", "target: swarm", ["deploy.target", "'swarm'", "'process' or 'docker'"]),
    ("tags: [vision, demo]", "tags: vision", ["tags", "list", "'vision'"]),
]


@pytest.mark.parametrize(("old", "new", "said"), WRONG)
def test_a_wrong_value_is_named_with_its_line(old: str, new: str, said: list[str]) -> None:
    assert TEXT.count(old) >= 1
    text = TEXT.replace(old, new, 1)
    with pytest.raises(ConfigError) as caught:
        parse_pipeline(text, PATH)
    message = str(caught.value)
    for part in said:
        assert part in message, message
    # The rule on runner and target spans the file and is told of the whole.
    if "stands in" not in message and "deploy.target" not in message:
        key = new.split(":", maxsplit=1)[0].strip()
        lines = {line_of(text, new), line_of(text, new) - 1}  # a rule on a group names the group's line
        assert any(f"{PATH}:{line}:" in message for line in lines), (key, message)


@pytest.mark.parametrize("stage", ["preprocess", "train", "evaluate", "serve"])
def test_a_missing_stage_is_named(stage: str) -> None:
    text = TEXT.replace(f"  {stage}:\n", "  drift:\n", 1)
    with pytest.raises(ConfigError, match=f"{stage} missing"):
        parse_pipeline(text, PATH)


@pytest.mark.parametrize("key", ["description", "owner", "task", "source", "stages"])
def test_a_missing_key_is_named(key: str) -> None:
    kept, skipping = [], False
    for line in TEXT.splitlines():
        skipping = line.startswith(f"{key}:") or (skipping and (line.startswith(" ") or not line))
        if not skipping:
            kept.append(line)
    with pytest.raises(ConfigError, match=f"{key}: is missing"):
        parse_pipeline("\n".join(kept), PATH)


def test_every_problem_is_listed_at_once() -> None:
    text = (
        TEXT.replace("owner: ds-team", "owner: 7").replace("runner: process", "runner: x").replace("cpus: 2", "cpu: 2")
    )
    with pytest.raises(ConfigError) as caught:
        parse_pipeline(text, PATH)
    assert len(caught.value.message.splitlines()) >= 3


def test_a_key_that_stands_twice_is_refused() -> None:
    text = TEXT + "owner: somebody-else\n"
    with pytest.raises(ConfigError, match="'owner' stands twice") as caught:
        parse_pipeline(text, PATH)
    assert f"{PATH}:{len(text.splitlines())}:" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: digits\n\towner: me\n", "2: not valid YAML"),
        ("name: [digits\n", "not valid YAML"),
        ("name: 'digits\n", "not valid YAML"),
        ("", "1: expected a mapping"),
        ("- a\n- b\n", "1: expected a mapping"),
        ("just text\n", "1: expected a mapping"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("name: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("{1: 2, [a]: 3}\n", "1: not valid YAML: a key must be a word"),
        ("name: dig\x00its\n", "not valid YAML"),
        ("name: dig\x1bits\n", "not valid YAML"),
    ],
)
def test_what_is_no_yaml_of_a_pipeline_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_pipeline(text, PATH)
    assert said in str(caught.value)
    assert str(PATH) in str(caught.value)


def test_a_file_called_otherwise_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text(TEXT)
    with pytest.raises(ConfigError, match="'digits' differs from the file's name") as caught:
        load_pipeline(path)
    assert f"{path}:{line_of(TEXT, 'name: digits')}:" in str(caught.value)


@pytest.mark.parametrize("name", ["Digits", "1digits", "digits-2", "a__b", "", "x" * 41, "digits_"])
def test_names_that_no_tag_could_hold_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name: "):
        parse_pipeline(TEXT.replace("name: digits", f"name: {name!r}"), PATH)


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.yaml", tmp_path / "binary.yaml"):
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            load_pipeline(path)
        assert str(path) in str(caught.value)


def test_a_wrong_file_leaves_the_others_alone(tmp_path: Path) -> None:
    for name in ("first", "second", "third"):
        (tmp_path / f"{name}.yaml").write_text(TEXT.replace("name: digits", f"name: {name}"))
    (tmp_path / "second.yaml").write_text("name: second\nowner: [\n")
    specs, errors = load_pipelines(tmp_path)
    assert [spec.name for spec in specs] == ["first", "third"]
    assert len(errors) == 1
    assert "second.yaml" in str(errors[0])


def test_the_shipped_pipelines_are_valid() -> None:
    specs, errors = load_pipelines(ROOT / "dags" / "configs")
    assert errors == []
    assert "digits" in [spec.name for spec in specs]


def test_a_pipeline_reads_back_from_its_json() -> None:
    spec = parse_pipeline(TEXT, PATH)
    again = PipelineSpec.model_validate(spec.model_dump(mode="json"))
    assert again == spec
    assert again.digest == spec.digest
    assert spec.repos == ["de_datapreprocessing", "ds_mlmodeling", "ds_modelserving"]
    assert spec.stages[Stage.PREPROCESS].resources.memory == 2**30
    assert spec.stages[Stage.TRAIN].resources.timeout == 1800.0


def test_a_pipeline_cannot_be_changed() -> None:
    spec = parse_pipeline(TEXT, PATH)
    with pytest.raises(ValueError, match="frozen"):
        spec.owner = "me"  # type: ignore[misc]


def test_the_digest_tells_every_change() -> None:
    spec = parse_pipeline(TEXT, PATH)
    for old, new in [("epochs: 6", "epochs: 7"), ("min: 0.93", "min: 0.94"), ("seed: 7", "seed: 8")]:
        assert parse_pipeline(TEXT.replace(old, new, 1), PATH).digest != spec.digest
    assert parse_pipeline("# a comment\n" + TEXT, PATH).digest == spec.digest


def test_sizes_of_a_containers_shared_memory_and_tmp() -> None:
    """At their defaults they leave the digest as it was before there were such keys."""
    spec = parse_pipeline(TEXT, PATH)
    limits = spec.stages[Stage.PREPROCESS].resources
    assert (limits.shm, limits.tmp) == (256 * 2**20, 512 * 2**20)
    content = spec.model_dump(mode="json")
    for stage in content["stages"].values():
        del stage["resources"]["shm"], stage["resources"]["tmp"]
    assert spec.digest == sha256_json(content)
    for key, size in (("shm", 2**30), ("tmp", 3 * 2**29)):
        other = parse_pipeline(TEXT.replace("memory: 1GiB", f"memory: 1GiB, {key}: {size / 2**30:g}GiB", 1), PATH)
        assert getattr(other.stages[Stage.PREPROCESS].resources, key) == size
        assert other.digest != spec.digest


def test_what_a_run_kept_under_another_version_is_read() -> None:
    spec = parse_pipeline(TEXT, PATH)
    kept = spec.model_dump(mode="json")
    kept["stages"]["train"]["image"] = None
    kept["since_gone"] = {"a": 1}
    assert PipelineSpec.stored(kept, "the plan") == spec
    kept["stages"]["train"]["resources"]["memory"] = "much"
    with pytest.raises(ContractError, match=r"the plan cannot be read.*train\.resources\.memory.*expected a size"):
        PipelineSpec.stored(kept, "the plan")


@pytest.mark.parametrize(("text", "size"), [("512MiB", 2**29), ("1.5 KiB", 1536), (7, 7), ("3B", 3)])
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["1MB", "MiB", "", -1, 0, True, 1.5, None, "1 GiB extra", "١MiB "])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("15m", 900.0), ("0.5s", 0.5), (3, 3.0), ("2 h", 7200.0), ("1d", 86400.0)]
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["15min", "", -3, 0, True, None, "m"])
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration(text)
