"""The release that answers: loaded, checked, swapped as a whole, and remembered across restarts."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from airloom.contract import Release, sha256_tree
from airloom.contract.errors import AirloomError, ConflictError, ContractError, NotFoundError
from airloom.contract.model import MODEL_FILE, ModelCard, load_predictor
from airloom.contract.predictor import Predictor

log = logging.getLogger(__name__)

RELEASE_FILE = "release.json"
MODEL_FOLDER = "model"


@dataclass(frozen=True, slots=True)
class Served:
    """A loaded release. A batch holds on to one, so a swap never mixes two."""

    release: Release
    card: ModelCard
    predictor: Predictor
    loaded_at: float = field(default_factory=time.time)


def load(model: Path, release_file: Path, *, pipeline: str, threads: int) -> Served:
    """Load a release and check that the model is the one it names.

    Raises:
        NotFoundError: a file is missing.
        ContractError: the release is another pipeline's, the model's bytes are not the release's, or the
            model cannot be loaded from its own code.
    """
    if not (model / MODEL_FILE).is_file():
        raise NotFoundError(f"there is no model in {model}", hint=f"expected {MODEL_FILE}, code/ and weights/ there")
    release = Release.read(release_file)
    if release.pipeline != pipeline:
        raise ContractError(
            f"{release_file} is a release of {release.pipeline!r}, but this process serves {pipeline!r}"
        )
    digest = sha256_tree(model)
    if digest != release.model_digest:
        raise ContractError(
            f"the model in {model} has digest {digest[:12]}…, but release {release.version} names "
            f"{release.model_digest[:12]}…",
            hint="the copy is incomplete or was changed: make the release again",
        )
    try:
        card, predictor = load_predictor(model)
    except AirloomError:
        raise
    except Exception as error:  # the model's own code: whatever it raises, the old model goes on
        raise ContractError(f"the model in {model} cannot be loaded: {type(error).__name__}: {error}") from error
    limit_threads(threads)
    return Served(release=release, card=card, predictor=predictor)


def limit_threads(threads: int) -> None:
    """Keep torch, if the model brought it in, from taking every processor for one batch."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def inside(folder: Path, root: Path | None) -> Path:
    """The real path of a release folder below the root.

    Raises:
        NotFoundError: it is elsewhere, or not there. Both read the same: this is no way to explore a disk.
    """
    refused = NotFoundError(
        "release_dir is not a release below the releases folder",
        hint="name a folder that `airloom` made: <releases>/<pipeline>/<version>",
    )
    if root is None or not folder.is_absolute():
        raise refused
    try:
        real, real_root = folder.resolve(strict=True), root.resolve(strict=True)
    except OSError:
        raise refused from None
    if real == real_root or not real.is_relative_to(real_root) or not real.is_dir():
        raise refused
    return real


class ServedHolder:
    """Which release answers now, and which one to load after a restart.

    Args:
        model / release_file: what the stage request names.
        state_dir: where a swap is remembered. It counts for a process that was started with the same
            release: a new deployment starts with its own.
    """

    def __init__(
        self,
        *,
        pipeline: str,
        model: Path,
        release_file: Path,
        releases_root: Path | None,
        state_dir: Path,
        threads: int,
    ) -> None:
        self.current: Served | None = None
        self.reason = "the model is being loaded"
        self._pipeline = pipeline
        self._model = model
        self._release_file = release_file
        self._root = releases_root
        self._state_dir = state_dir
        self._threads = threads
        self._lock = threading.Lock()

    def load_first(self) -> Served:
        """Load what this process has to serve at its start: the request's release, or the one swapped in since.

        Raises:
            AirloomError: it cannot be loaded; `reason` says so to people.
        """
        with self._lock:
            try:
                self.current = self._load_swapped() or self._load(self._model, self._release_file)
            except AirloomError:
                self.reason = "the model could not be loaded; the service's log says why"
                raise
            return self.current

    def swap(self, folder: Path) -> Served:
        """Load a release beside the one that answers, then let it answer.

        Raises:
            ConflictError: another swap is under way.
            AirloomError: it cannot be loaded; the old one goes on answering.
        """
        if not self._lock.acquire(blocking=False):
            raise ConflictError("another model is being loaded", hint="try again when it is done")
        try:
            real = inside(folder, self._root)
            served = self._load(real / MODEL_FOLDER, real / RELEASE_FILE)
            self._remember(real)
            self.current = served
            return served
        finally:
            self._lock.release()

    def _load(self, model: Path, release_file: Path) -> Served:
        return load(model, release_file, pipeline=self._pipeline, threads=self._threads)

    @property
    def _state_file(self) -> Path:
        version = Release.read(self._release_file).version
        return self._state_dir / f"swapped-{self._pipeline}-{version}.json"

    def _remember(self, folder: Path) -> None:
        path = self._state_file
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"release_dir": str(folder)}), encoding="utf-8")
        temporary.replace(path)

    def _load_swapped(self) -> Served | None:
        try:
            folder = Path(json.loads(self._state_file.read_bytes())["release_dir"])
            real = inside(folder, self._root)
            return self._load(real / MODEL_FOLDER, real / RELEASE_FILE)
        except FileNotFoundError:
            return None
        except (AirloomError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the release swapped in before the restart cannot be loaded, so the first one is: %s", error)
            return None
