"""The gate's decision as a picture."""

from __future__ import annotations

import io

from airloom.contract import GateDecision, Verdict
from airloom.spec.pipeline import GateSpec

_CANDIDATE = "#2f6fb7"
_CHAMPION = "#9aa5b1"
_BOUND = "#c0392b"
_MOST_METRICS = 8


def gate_plot(gate: GateSpec, decision: GateDecision) -> bytes:
    """A PNG: candidate, champion and thresholds, one panel for each metric that the gate looks at."""
    # Not pyplot: it keeps figures alive and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    looked_at = [*gate.thresholds, *([gate.champion.metric] if gate.champion else [])]
    names = [name for name in dict.fromkeys(looked_at) if name in decision.metrics] or sorted(decision.metrics)
    names = names[:_MOST_METRICS]
    chart = Figure(figsize=(max(3.2, 2.4 * len(names)), 3.6), layout="constrained")
    FigureCanvasAgg(chart)
    verdict = f"{decision.model_name} version {decision.model_version}: {decision.verdict.value}"
    chart.suptitle(verdict, color=_BOUND if decision.verdict is Verdict.REJECTED else "#1e7d43", fontsize=11)
    if not names:
        chart.text(0.5, 0.5, "nothing was measured", ha="center")
    for number, name in enumerate(names, start=1):
        axes = chart.add_subplot(1, len(names), number)
        bars = [("candidate", decision.metrics[name], _CANDIDATE)]
        other = (decision.champion_metrics or {}).get(name)
        if other is not None:
            bars.append((f"champion {decision.champion_version}", other, _CHAMPION))
        drawn = axes.bar([bar[0] for bar in bars], [bar[1] for bar in bars], color=[bar[2] for bar in bars], width=0.6)
        axes.bar_label(drawn, fmt="%.4g", fontsize=8)
        bounds = gate.thresholds.get(name)
        for bound in (bounds.min, bounds.max) if bounds else ():
            if bound is not None:
                axes.axhline(bound, color=_BOUND, linestyle="--", linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.margins(y=0.15)
    buffer = io.BytesIO()
    chart.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
