"""The grammar of version tags, over commit messages and names as people write them."""

from __future__ import annotations

import re
import subprocess
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airloom.contract.version_tag import SLUG_MAX_LENGTH, VersionTag, slugify
from airloom.errors import ContractError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TIME = datetime(2026, 11, 21, 4, 35, 10, 123456, tzinfo=UTC)
TAG = "digits/CV_wider-network_01234567_DV_20261121T043510123Z"

MESSAGES = [
    ("Wider network", "wider-network"),
    ("feature/digits: use ../../etc/passwd", "feature-digits-use-etc-passwd"),
    ("fix(train): 50 % faster [#12]", "fix-train-50-faster-12"),
    ("🚀 ship it 🎉", "ship-it"),
    ("🚀🎉", "no-message"),
    ("", "no-message"),
    ("   \n\t ", "no-message"),
    ("...---...!?", "no-message"),
    ("\n\nSecond try\nwith a body\n", "second-try"),
    ("one\r\ntwo", "one"),
    ("Crème brûlée für Ångström", "creme-brulee-fur-angstrom"),
    ("שלום עולם", "no-message"),
    ("مرحبا v2 بالعالم", "v2"),
    ("\u202eright to left\u202c", "right-to-left"),
    ("中文提交信息", "no-message"),
    ("-rf --force", "rf-force"),
    ("name.lock", "name-lock"),
    ("a..b@{c}~1^2:3?*[", "a-b-c-1-2-3"),
    ("x" * 500, "x" * SLUG_MAX_LENGTH),
    (("word " * 100).strip(), "word-word-word-word-word-word-word-word"),
    ("a" * 39 + " b", "a" * 39),
    ("①② ½ ﬁ", "12-12-fi"),
    ("tab\tand\x00null\x1bescape", "tab-and-null-escape"),
]

INVALID = [
    "",
    "digits",
    "digits/",
    TAG.removeprefix("digits"),
    TAG.replace("digits/", ""),
    TAG.replace("digits/", "Digits/"),
    TAG.replace("digits/", "digits//"),
    TAG.replace("digits/", "../digits/"),
    TAG.replace("digits/", "1digits/"),
    TAG.replace("digits/", "digits_/"),
    TAG.replace("CV_", "cv_"),
    TAG.replace("wider-network", ""),
    TAG.replace("wider-network", "-wider"),
    TAG.replace("wider-network", "wider-"),
    TAG.replace("wider-network", "wider--network"),
    TAG.replace("wider-network", "wider_network"),
    TAG.replace("wider-network", "Wider"),
    TAG.replace("wider-network", "wider network"),
    TAG.replace("wider-network", "größer"),
    TAG.replace("01234567", "0123456"),
    TAG.replace("01234567", "012345678"),
    TAG.replace("01234567", "0123456G"),
    TAG.replace("01234567", "ABCDEF01"),
    TAG.replace("_DV_", "_dv_"),
    TAG.replace("20261121", "20261321"),
    TAG.replace("20261121", "20260230"),
    TAG.replace("T043510123Z", "T253510123Z"),
    TAG.replace("T043510123Z", "T043510Z"),
    TAG.replace("T043510123Z", "T043510123"),
    TAG.replace("T043510123Z", "T043510123z"),
    TAG.replace("T043510123Z", "T04351012３Z"),
    TAG + "\n",
    " " + TAG,
    TAG + ".lock",
    "refs/tags/" + TAG,
]


def make(message: str, *, time: datetime = TIME, pipeline: str = "digits") -> VersionTag:
    return VersionTag.make(pipeline=pipeline, commit=COMMIT, message=message, time=time)


@pytest.mark.parametrize(("message", "slug"), MESSAGES)
def test_a_commit_message_becomes_a_slug(message: str, slug: str) -> None:
    assert slugify(message) == slug
    assert VersionTag.parse(str(make(message))).slug == slug


def test_a_tag_is_written_as_the_grammar_says() -> None:
    assert str(make("Wider network")) == TAG


def test_git_takes_the_tag_of_every_message() -> None:
    for message, _ in MESSAGES:
        name = f"refs/tags/{make(message)}"
        assert subprocess.run(["git", "check-ref-format", name], check=False).returncode == 0, name


@pytest.mark.parametrize("name", INVALID)
def test_what_is_no_tag_is_refused_with_its_name(name: str) -> None:
    with pytest.raises(ContractError, match=re.escape(repr(name))):
        VersionTag.parse(name)


pipelines = st.from_regex(r"[a-z][a-z0-9]{0,8}(_[a-z0-9]{1,8}){0,2}", fullmatch=True)
commits = st.text("0123456789abcdef", min_size=40, max_size=40)
zones = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
times = st.datetimes(datetime(1000, 1, 2), datetime(9999, 12, 30), timezones=zones)  # noqa: DTZ001 - zones are added


@given(pipelines, commits, st.text(max_size=600), times)
def test_any_message_gives_a_tag_that_reads_back(pipeline: str, commit: str, message: str, time: datetime) -> None:
    tag = VersionTag.make(pipeline=pipeline, commit=commit, message=message, time=time)
    name = str(tag)
    assert VersionTag.parse(name) == tag
    assert len(name) <= len(pipeline) + SLUG_MAX_LENGTH + 40
    assert re.fullmatch(r"[a-z0-9_]+/[A-Za-z0-9_-]+", name)
    assert timedelta(0) <= time - tag.time < timedelta(milliseconds=1)


@given(st.text(max_size=120))
def test_any_text_is_a_tag_that_writes_back_or_is_refused(name: str) -> None:
    try:
        tag = VersionTag.parse(name)
    except ContractError:
        return
    assert str(tag) == name


@given(times, st.integers(1, 2000))
def test_the_next_tag_is_later_and_sorts_behind(time: datetime, steps: int) -> None:
    tag = make("Same message", time=time)
    later = tag
    for _ in range(min(steps, 20)):
        later = later.next()
        assert str(later) > str(tag)
    assert VersionTag.parse(str(later)) == later
