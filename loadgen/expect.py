"""What a run is expected to reach: `p99<10ms`, `lost==0`, `achieved_rate>=19k`. Pure.

An expectation of something that was not measured is not met, because nobody can say that it was.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Final, Literal

import msgspec

from loadgen import notation
from loadgen.spec import LoadError, LoadSpec

Unit = Literal["time", "count", "rate", "bytes", "share"]

FIGURES: Final[dict[str, Unit]] = {
    "p50": "time",
    "p90": "time",
    "p99": "time",
    "p99_9": "time",
    "max": "time",
    "service_p50": "time",
    "service_p99": "time",
    "queue_p50": "time",
    "queue_p99": "time",
    "send_lag_p50": "time",
    "send_lag_p99": "time",
    "recovery": "time",
    "published": "count",
    "handled": "count",
    "dead_lettered": "count",
    "lost": "count",
    "duplicates": "count",
    "redelivered": "count",
    "out_of_order": "count",
    "not_delivered": "count",
    "waiting": "count",
    "unchecked": "count",
    "achieved_rate": "rate",
    "worker_rss": "bytes",
    "worker_cpu": "share",
}
"""What can be expected of, and in which unit. Times without a prefix are the response time, from the intended instant."""

NO_LOADS_FAULT: Final = ("dead_lettered", "lost", "duplicates", "redelivered", "out_of_order", "worker_rss")
"""Counts of what handlers or the bus have done wrong, and memory: too much is too much, however late the generator was."""

_OPERATORS: Final[dict[str, Callable[[float, float], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
}
_UNITS: Final[dict[Unit, str]] = {
    "time": "us, ms or s, for instance 'p99<10ms'",
    "bytes": "KB, MB or GB, for instance 'worker_rss<200MB'",
}
_READ: Final[dict[Unit, Callable[[str], float]]] = {
    "time": notation.seconds,
    "count": notation.count,
    "rate": notation.rate,
    "bytes": notation.size,
    "share": notation.share,
}
_TEXT: Final = re.compile(r"\s*([a-z][a-z0-9_.]*)\s*(<=|>=|==|!=|<|>|=)\s*(\S.*?)\s*", re.IGNORECASE)


class Expectation(msgspec.Struct, frozen=True, kw_only=True):
    """One expectation. `bound` is in seconds, events, events per second, bytes or as a share of 1."""

    text: str
    figure: str
    operator: str
    bound: float

    def is_met_by(self, measured: float) -> bool:
        """Whether that much, in the unit of `bound`, is what is expected."""
        return _OPERATORS[self.operator](measured, self.bound)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an expectation; `measured` in its unit, None where it was not measured."""

    text: str
    measured: float | None
    met: bool
    is_excused: bool = False
    """It is not met, and a generator that was late, or a bus that did not keep up, may be why."""


def parse(text: str) -> Expectation:
    """An expectation as people write it.

    Raises:
        LoadError: it is none; the text says what there is to expect.
    """
    found = _TEXT.fullmatch(text)
    figure = "" if found is None else found[1].lower().replace(".", "_")
    if found is None or figure not in FIGURES:
        raise LoadError(
            f"{text!r} is no expectation; give a figure, a comparison and a bound, for instance 'p99<10ms' or 'lost==0'. "
            f"Figures: {', '.join(FIGURES)}"
        )
    sign = "==" if found[2] == "=" else found[2]
    return Expectation(text=text.strip(), figure=figure, operator=sign, bound=_bound(FIGURES[figure], found[3], text))


def _bound(unit: Unit, value: str, text: str) -> float:
    if unit in _UNITS and value[-1:].isdigit() and float(notation.number(value)):
        raise LoadError(f"{text!r} says no unit; give {_UNITS[unit]}")
    return _READ[unit](value)


def check_measurable(expectation: Expectation, spec: LoadSpec) -> None:
    """Refuse what this load can never measure, before it runs. Raises `LoadError`."""
    figure = expectation.figure
    why = ""
    if spec.commands and figure.startswith(("service_", "queue_")):
        why = "of commands, only the response time is known; expect of p50 to max"
    elif figure == "recovery" and all(fault.kind == "stop" for fault in spec.faults):
        why = "nothing is to recover from; add a fault that ends a worker, for instance --fault kill:worker@5s"
    elif not spec.is_paced and FIGURES[figure] == "time" and figure != "recovery":
        why = "at full speed, a latency is the length of the queues, and none is quoted; give a --rate"
    if why:
        raise LoadError(f"--expect {expectation.text!r} can never be met: {why}")


def check(expectation: Expectation, figures: Mapping[str, float | None]) -> Outcome:
    """Hold an expectation against what was measured: times in seconds, everything else in its unit."""
    measured = figures.get(expectation.figure)
    met = measured is not None and expectation.is_met_by(measured)
    is_too_much = expectation.figure in NO_LOADS_FAULT and (measured or 0.0) > expectation.bound
    return Outcome(text=expectation.text, measured=measured, met=met, is_excused=not (met or is_too_much))


def shown(outcome: Outcome) -> str:
    """An outcome for people."""
    if outcome.measured is None:
        return f"{outcome.text}: NOT MEASURED"
    unit = FIGURES[parse(outcome.text).figure]
    value = outcome.measured
    match unit:
        case "time":
            text = f"{value * 1000:,.3f} ms"
        case "bytes":
            text = f"{value / 1e6:,.1f} MB"
        case "share":
            text = f"{value:.0%}"
        case "rate":
            text = f"{value:,.0f}/s"
        case "count":
            text = f"{value:,.0f}"
    return f"{outcome.text}: {text}"
