"""The steps of a build, which may be taken in one process or in several, one after the other.

A note in the store says how far a build has come. Whoever goes on with it does what is left; what was made or tested
before counts as long as it is the same image, or the same environment where there is none. The note goes with the
build's end.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from airloom.contract import CodePin, Frozen, ImageRef
from airloom.contract.build import BuildRecord
from airloom.contract.push import Asker, Outcome, PushBuildStart
from airloom.errors import AirloomError, ContractError, NotFoundError
from airloom.flows import build_checks, images
from airloom.flows.checkout import ensure_checkout
from airloom.flows.lease import Lease
from airloom.flows.push_entry import BuildEntry
from airloom.hooks.connect import Hooks
from airloom.spec.stage_repo import StageRepo

Step = Literal["inspect", "build", "test", "push", "report"]

Progress = Callable[[str], None]


class BuildNote(Frozen):
    """`building/<repo>/<commit>.json` in the store: how far a build has come that has not ended.

    Attributes:
        entry: its start in the ledger of pushes; none after an error, which ends an entry and not the note.
        inspected: whether it was checked out and linted.
        image: what was built, and pushed if it says so.
        tested: what `main.py` and the tests have passed in: the digest of the image, or of the environment without one.
        seconds: what was spent on it so far.
    """

    schema_version: Literal[1] = 1
    entry: PushBuildStart | None = None
    inspected: bool = False
    image: ImageRef | None = None
    tested: str = ""
    seconds: float = 0.0


class BuildSteps:
    """What is left of a commit's build.

    Args:
        held: the commit's lease: a note is written by its holder alone.
        environment: digest of what code runs in that runs in no container.
        on_work: called before the first thing that is really done.
    """

    def __init__(  # noqa: PLR0917 - one caller
        self,
        hooks: Hooks,
        pin: CodePin,
        held: Lease,
        environment: str,
        on_progress: Progress,
        on_work: Callable[[], object],
    ) -> None:
        self._hooks, self._settings = hooks, hooks.settings
        self._pin = pin
        self._held = held
        self._environment = environment
        self._on_progress = on_progress
        self._on_work = on_work
        self._what = f"{pin.repo}@{pin.commit[:8]}"
        self._works = False
        self._entry: BuildEntry | None = None
        self._key = f"building/{pin.repo}/{pin.commit}.json"
        self._note = self._read()
        self._goes_on = self._note.entry is not None
        self._since = time.monotonic()

    # The build's entry in the ledger

    def start(self, asked_by: Asker, pusher: str) -> None:
        """Begin the entry, or go on with the one that an earlier process has begun.

        Raises:
            ServiceError: the store refused or did not answer.
        """
        if self._entry is not None:
            return
        pin = self._pin
        start = self._note.entry or PushBuildStart(
            repo=pin.repo,
            commit=pin.commit,
            id=uuid.uuid4().hex[:16],
            at=datetime.now(UTC),
            asked_by=asked_by,
            pusher=pusher,
            message=pin.message.partition("\n")[0],
        )
        self._save(entry=start)
        self._entry = BuildEntry(self._hooks, start, self._on_progress)

    def end(self, outcome: Outcome, reason: str = "", *, airflow: str = "", image: str = "") -> None:
        """End the entry. After an error the next build goes on from here; otherwise it begins anew.

        Args:
            outcome: `found` counts as `built` where an earlier process of this build has stored the record.
        """
        if self._entry is not None:
            ended: Outcome = "built" if outcome == "found" and self._goes_on else outcome
            self._entry.end(ended, reason, airflow=airflow, image=image)
        with suppress(AirloomError):  # a note that stays is gone on with
            if outcome == "error":
                self._save(entry=None)
            else:
                self._held.check()
                self._hooks.store.remove(self._settings.bucket_airloom, self._key)

    # Steps

    def run(self, until: Step) -> None:
        """Do what is left of the steps up to this one; to report is for who asks.

        Raises:
            BuildFailedError: the commit cannot be used; says why.
            LeaseLostError: another builds it.
            ServiceError: the engine, the registry, the git server or the store refused or did not answer.
        """
        folder = self._inspect()
        if until == "inspect":
            return
        self._build(folder)
        if until == "build":
            return
        self._test(folder)
        if until != "test":
            self._push()

    def record(self, pusher: str) -> BuildRecord:
        """What is to be known of the build once all of it is done."""
        pin = self._pin
        folder = ensure_checkout(self._hooks, pin.repo, pin.commit)
        stages = StageRepo.load(folder)
        self._say(f"built in {self._seconds():.1f} s: {', '.join(stage.value for stage in stages.stages)}")
        return BuildRecord(
            repo=pin.repo,
            commit=pin.commit,
            message=pin.message,
            author=pin.author,
            pusher=pusher,
            environment=self._environment,
            stages={stage: stages.code_digest(folder, stage) for stage in stages.stages},
            image=self._note.image,
            built_at=datetime.now(UTC),
            seconds=self._seconds(),
            url=self._settings.build_url,
        )

    def _inspect(self) -> Path:
        if not self._note.inspected:
            self._begin("checking out")
        folder = ensure_checkout(self._hooks, self._pin.repo, self._pin.commit)
        if self._note.inspected:
            self._say("inspected already")
        else:
            self._begin("linting")
            build_checks.lint(self._what, folder)
            self._save(inspected=True)
        return folder

    def _build(self, folder: Path) -> None:
        if not images.makes_images(self._settings):
            self._say("no stage runs in containers here: no image is built")
            self._save(image=None)
        elif images.is_current(self._settings, self._note.image, folder):
            self._say("its image was built already")
        else:
            self._begin("building its image")
            self._save(image=images.build_stage_image(self._settings, self._pin, folder, self._on_progress))

    def _test(self, folder: Path) -> None:
        image = self._note.image
        place = image.digest if image else self._environment
        if self._note.tested == place:
            self._say("tested already")
            return
        runs_in = image.pull_ref if image else ""
        self._begin("loading main.py")
        build_checks.load_entry_point(self._settings, self._what, folder, runs_in)
        self._begin("testing")
        build_checks.run_tests(self._settings, self._what, folder, StageRepo.load(folder).tests, runs_in)
        self._save(tested=place)

    def _push(self) -> None:
        image = self._note.image
        if image is None:
            self._say("no image is pushed")
        elif not self._settings.registry:
            self._say("no registry is named: its image stays in the engine")
        elif image.pushed:
            self._say("its image was pushed already")
        else:
            self._begin(f"pushing {image.name}:{image.tag}")
            pushed = images.push_stage_image(self._settings, image)
            self._save(image=pushed, tested=pushed.digest)

    def _say(self, line: str) -> None:
        self._on_progress(f"{self._what}: {line}")

    def _begin(self, line: str) -> None:
        if not self._works:
            self._works = True
            self._on_work()
        self._say(line)

    # The note

    def _seconds(self) -> float:
        return round(self._note.seconds + time.monotonic() - self._since, 3)

    def _read(self) -> BuildNote:
        """A build's note that cannot be read is of another version of Airloom: it begins anew."""
        try:
            return BuildNote.model_validate(self._hooks.store.get_json(self._settings.bucket_airloom, self._key))
        except (NotFoundError, ContractError, ValueError):
            return BuildNote()

    def _save(self, **changes: Any) -> None:
        note = self._note.model_copy(update=changes)
        if note == self._note:
            return
        note = note.model_copy(update={"seconds": self._seconds()})
        self._held.check()
        self._hooks.store.put_json(self._settings.bucket_airloom, self._key, note.model_dump(mode="json"))
        self._note, self._since = note, time.monotonic()
