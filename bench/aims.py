"""What a benchmark's figures are held to; each table shows it beside them."""

from __future__ import annotations


def held_to(value: float, *, at_least: float | None = None, at_most: float | None = None) -> str:
    """The bound and whether a figure keeps it, such as `<= 0.30: met`."""
    if at_least is not None:
        return f">= {at_least:.2f}: {'met' if value >= at_least else 'missed'}"
    if at_most is not None:
        return f"<= {at_most:.2f}: {'met' if value <= at_most else 'missed'}"
    raise TypeError("an aim is either at_least or at_most")
