"""How people write loads, faults and times: `20k`, `5k:10s,1k-50k:30s`, `zipf:1.1`, `kill:worker@5s`. Pure.

Every function raises `LoadError` with the text and an example of what it takes.
"""

from __future__ import annotations

import re
from typing import Final

from loadgen.pacer import Stage
from loadgen.spec import KEYS_MAX, FaultSpec, LoadError, Payload, Skew

_NUMBER: Final = r"[0-9][0-9_,]*(?:\.[0-9]+)?|\.[0-9]+"
_SCALES: Final = {"": 1.0, "k": 1e3, "m": 1e6}
_SECONDS: Final = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_BYTES: Final = {"": 1, "b": 1, "k": 1e3, "kb": 1e3, "kib": 1024, "m": 1e6, "mb": 1e6, "mib": 1024**2, "gb": 1e9}
_COUNT: Final = re.compile(rf"({_NUMBER})\s*([km]?)", re.IGNORECASE)
_SHARE: Final = re.compile(rf"({_NUMBER})\s*(%?)")
_TIME: Final = re.compile(rf"({_NUMBER})\s*([a-zµ]*)", re.IGNORECASE)
_SIZE: Final = re.compile(rf"({_NUMBER})\s*([a-z]*)", re.IGNORECASE)
_FAULT: Final = re.compile(r"(kill|stop|term):worker(?:-?(\d+))?(?::([^@]+))?@(.+)")


def number(text: str) -> float:
    """A number with separators of thousands."""
    return float(text.replace(",", "").replace("_", ""))


def rate(text: str) -> float:
    """Events per second: `20000`, `20k`, `1.5M`."""
    found = _scaled(text.strip().removesuffix("/s"))
    if found is None:
        raise LoadError(f"{text!r} is no rate; give events per second, for instance 20000 or 20k, or max")
    return found


def count(text: str) -> float:
    """How many: `0`, `19,988`, `10k`."""
    found = _scaled(text.strip())
    if found is None:
        raise LoadError(f"{text!r} is no number; give how many, for instance 0 or 10k")
    return found


def _scaled(text: str) -> float | None:
    """A number with `k` or `M` behind it or not; None: it is none."""
    found = _COUNT.fullmatch(text)
    return None if found is None else number(found[1]) * _SCALES[found[2].lower()]


def share(text: str) -> float:
    """A part of one: `0.8`, `80%`."""
    found = _SHARE.fullmatch(text.strip())
    if found is None:
        raise LoadError(f"{text!r} is no share; give a part of one core, for instance 0.8 or 80%")
    return number(found[1]) / (100 if found[2] else 1)


def rate_or_max(text: str) -> float | None:
    """A rate, or `max`, which is None."""
    return None if text.strip().lower() == "max" else rate(text)


def seconds(text: str) -> float:
    """A time: `10`, `10s`, `500ms`, `2m`, `1h`."""
    found = _TIME.fullmatch(text.strip())
    if found is None or found[2].lower() not in _SECONDS:
        raise LoadError(f"{text!r} is no time; give seconds, for instance 10, 10s, 500ms or 2m")
    return number(found[1]) * _SECONDS[found[2].lower()]


def size(text: str) -> int:
    """Bytes: `100`, `10kB`, `75MB`."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or found[2].lower() not in _BYTES:
        raise LoadError(f"{text!r} is no size; give bytes, for instance 100 or 10kB")
    return round(number(found[1]) * _BYTES[found[2].lower()])


def keys(text: str) -> int | None:
    """How many keys, or `unique`, which is None."""
    if text.strip().lower() == "unique":
        return None
    found = _scaled(text.strip())
    if found is None or not found.is_integer():
        raise LoadError(f"{text!r} is no number of keys; give one up to {KEYS_MAX:,}, or unique")
    return int(found)


def stages(text: str) -> tuple[Stage, ...]:
    """Rates and how long each: `5k:10s,20k:30s`; a ramp has two rates: `1k-50k:20s`."""
    return tuple(map(_stage, text.split(",")))


def _stage(text: str) -> Stage:
    rates, colon, length = text.partition(":")
    if not colon:
        raise LoadError(f"{text!r} is no stage; give a rate and how long, for instance 5k:10s, or a ramp: 1k-50k:20s")
    first, dash, last = rates.partition("-")
    return Stage(rate(first), seconds(length), rate(last) if dash else None)


def skew(text: str) -> Skew:
    """How events are spread over keys: `uniform`, `zipf:1.1`, `hot:0.9`."""
    kind, _, by = text.strip().lower().partition(":")
    try:
        match kind:
            case "uniform" if not by:
                return Skew()
            case "zipf":
                return Skew(kind="zipf", by=number(by) if by else 1.0)
            case "hot":
                return Skew(kind="hot", by=number(by) if by else 0.9)
    except ValueError:
        pass
    raise LoadError(f"{text!r} is no skew; give uniform, zipf:EXPONENT or hot:SHARE, for instance zipf:1.1 or hot:0.9")


def payload(text: str) -> Payload:
    """How many bytes: `100`, `10-1000` (evenly between), `lognormal:MEDIAN:SIGMA`."""
    kind, *rest = text.strip().lower().split(":")
    try:
        if kind == "lognormal":
            median, sigma = rest
            return Payload(kind="lognormal", low=size(median), sigma=number(sigma))
        if not rest:
            low, dash, high = kind.partition("-")
            if dash:
                return Payload(kind="uniform", low=size(low), high=size(high))
            return Payload(low=size(low))
    except ValueError:
        pass
    raise LoadError(f"{text!r} is no payload; give bytes, LOW-HIGH or lognormal:MEDIAN:SIGMA, for instance 100 or 10-1000")


def fault(text: str) -> FaultSpec:
    """What is done to a worker, and when: `kill:worker@5s`, `stop:worker:1s@10s`, `term:worker1@3s`."""
    found = _FAULT.fullmatch(text.strip().lower())
    if found is None or (found[1] == "stop") != (found[3] is not None):
        raise LoadError(
            f"{text!r} is no fault; give kill:worker@5s, term:worker@5s or stop:worker:1s@10s (for a second, after ten); "
            "worker2 is that of shard 2"
        )
    kind: str = found[1]
    return FaultSpec(
        kind=kind,  # type: ignore[arg-type]  # the pattern has the same three
        shard=None if found[2] is None else int(found[2]),
        seconds=0.0 if found[3] is None else seconds(found[3]),
        at_s=seconds(found[4]),
    )
