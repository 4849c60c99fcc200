"""The parameters of the preprocess stage, checked before anything is read."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from airloom.contract import Frozen, StageInputError


class Fractions(Frozen):
    """The part of the rows that each split gets; they add up to 1."""

    train: float = Field(default=0.7, gt=0, lt=1)
    validation: float = Field(default=0.15, gt=0, lt=1)
    test: float = Field(default=0.15, gt=0, lt=1)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"the fractions add up to {total:g}, not to 1")
        return self


class PreprocessParams(Frozen):
    """`stages.preprocess.params` of a pipeline.

    Attributes:
        image_size: side of the square pictures in the shards, in pixels.
        rows_per_shard: rows in one Parquet file at most.
        split: fraction of each split.
    """

    image_size: int = Field(default=28, ge=8, le=1024)
    rows_per_shard: int = Field(default=1000, ge=1)
    split: Fractions = Fractions()

    @classmethod
    def of(cls, params: dict[str, Any]) -> PreprocessParams:
        """Check the parameters of a request.

        Raises:
            StageInputError: a parameter is unknown or out of range; every problem is listed.
        """
        try:
            return cls.model_validate(params)
        except ValidationError as error:
            problems = (
                f"stages.preprocess.params.{'.'.join(map(str, e['loc']))}: {e['msg']}, found {e['input']!r}"
                for e in error.errors()
            )
            raise StageInputError("\n".join(problems)) from None
