"""Sizes and durations as people write them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

_SIZES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DURATIONS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_size(value: object) -> int:
    """`512MiB` → bytes. A whole number is taken as bytes.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)\s*", value, re.ASCII)
        if isinstance(value, str)
        else None
    )
    if match is None:
        raise ValueError("expected a size such as 512MiB or 2GiB (units: B, KiB, MiB, GiB, TiB)")
    return int(float(match[1]) * _SIZES[match[2]])


def parse_duration(value: object) -> float:
    """`15m` → seconds. A number is taken as seconds.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return float(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h|d)\s*", value, re.ASCII) if isinstance(value, str) else None
    if match is None:
        raise ValueError("expected a duration such as 30s, 15m or 2h (units: s, m, h, d)")
    return float(match[1]) * _DURATIONS[match[2]]


SizeBytes = Annotated[int, BeforeValidator(parse_size), PlainSerializer(int, return_type=int)]
Seconds = Annotated[float, BeforeValidator(parse_duration), PlainSerializer(float, return_type=float)]
