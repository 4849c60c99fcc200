"""What a run may be given, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from airloom.contract import Trigger
from airloom.errors import ConfigError
from airloom.flows.resolve import RunParams, resolve
from tests.fixtures.plans import NOW, TAG, MemoryStore, make_spec

HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("revision", ["main", HASH, HASH[:8], "feature/a-b", "v1.0", "_x", "HEAD~2", "größe"])
def test_revisions(revision: str) -> None:
    assert RunParams.parse({"commits": {"ds_model": revision}}).commits == {"ds_model": revision}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"commit": {}}, ["commit: there is no such parameter", "commits, reproduce, force, skip_approval"]),
        ({"commits": ["a"]}, ["commits", "['a']"]),
        ({"commits": {"ds_model": 7}}, ["commits.ds_model", "7"]),
        ({"commits": {"ds_model": ""}}, ["commits.ds_model", "'' is no branch, tag or hash"]),
        ({"commits": {"ds_model": "--upload-pack=evil"}}, ["'--upload-pack=evil' is no branch, tag or hash"]),
        ({"commits": {"ds_model": "a b"}}, ["'a b' is no branch"]),
        ({"commits": {"ds_model": "a\nb"}}, ["is no branch"]),
        ({"commits": {"ds_model": "x" * 201}}, ["commits.ds_model", "200"]),
        ({"reproduce": 5}, ["reproduce", "5"]),
        ({"force": "maybe"}, ["force", "'maybe'"]),
        ({"force": None}, ["force", "None"]),
        ({"force": 3, "skip_approval": "x"}, ["force", "skip_approval"]),
    ],
)
def test_wrong_parameters_are_named(given: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        RunParams.parse(given)
    for part in said:
        assert part in str(caught.value)


def test_no_parameters_are_fine_and_cannot_be_changed() -> None:
    params = RunParams.parse({})
    assert params == RunParams()
    with pytest.raises(ValueError, match="frozen"):
        params.force = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"commits": {"nowhere": "main"}}, ["'nowhere' is no stage repo of digits", "de_data, ds_model, ds_serve"]),
        ({"commits": {"ds_model": "main"}, "reproduce": TAG}, ["fixes every commit", "give one of the two"]),
        ({"reproduce": "latest"}, ["reproduce: 'latest' is not a version tag", "DV_<YYYYMMDDThhmmssmmmZ>"]),
        ({"reproduce": TAG.replace("digits", "faces")}, ["is a version of faces, not of digits"]),
    ],
)
def test_parameters_that_do_not_fit_the_pipeline_are_refused_before_anything_is_asked(
    given: dict[str, Any], said: list[str]
) -> None:
    hooks: Any = SimpleNamespace(store=MemoryStore(), settings=SimpleNamespace(bucket_airloom="airloom"))
    with pytest.raises(ConfigError) as caught:
        resolve(
            hooks,
            spec=make_spec(),
            run_id="r",
            params=RunParams.parse(given),
            trigger=Trigger(kind="manual"),
            now=NOW,
        )
    for part in said:
        assert part in str(caught.value)
    assert hooks.store.objects == {}
