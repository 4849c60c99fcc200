"""An image that stages or releases run from, pinned."""

from __future__ import annotations

from pydantic import Field

from airloom.contract.base import Frozen


class ImageRef(Frozen):
    """An image by its content.

    Attributes:
        name: repository with its registry, without a tag: `localhost:5000/airloom/ds_mlmodeling`.
        tag: under which people find it: the commit.
        digest: of the manifest where a registry holds it, else the engine's image id; both `sha256:…`.
        pushed: whether a registry holds it.
        runtime: digest of the runtime image that it was built from.
        size_bytes: unpacked.
    """

    name: str
    tag: str
    digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    pushed: bool
    runtime: str
    size_bytes: int = 0

    @property
    def pull_ref(self) -> str:
        """What an engine is asked for: content, never a tag that may move."""
        return f"{self.name}@{self.digest}" if self.pushed else self.digest
