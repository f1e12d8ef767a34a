"""Circuits, by scripts: what happened when, and where the circuit stood afterwards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardbus.breaker import Admitted, Blocked, Breaker, Circuit, CircuitState
from shardbus.errors import RegistrationError

S = 1_000_000_000
POLICY = Breaker(failures=3, window_s=10.0, open_s=5.0, successes=2)


def call(circuit: Circuit, at_s: float, *, ok: bool) -> bool:
    """Call the handler where it is admitted; say whether it was."""
    admitted = circuit.admit(int(at_s * S))
    if isinstance(admitted, Blocked):
        return False
    if ok:
        circuit.succeeded(admitted.term)
    else:
        circuit.failed(admitted.term, int(at_s * S))
    return True


# (second, whether the handler succeeds, whether it is called, the state afterwards)
SCRIPTS: dict[str, list[tuple[float, bool, bool, str]]] = {
    "a handler that fails opens its circuit": [
        (0, False, True, "closed"), (1, False, True, "closed"), (2, False, True, "open"), (3, True, False, "open"),
    ],
    "failures that are too far apart do not": [
        (0, False, True, "closed"), (6, False, True, "closed"), (12, False, True, "closed"), (15, False, True, "open"),
    ],
    "successes in between do not hide failures": [
        (0, False, True, "closed"), (1, True, True, "closed"), (2, False, True, "closed"), (3, True, True, "closed"),
        (4, False, True, "open"),
    ],
    "after the pause it takes two successes to close": [
        (0, False, True, "closed"), (0, False, True, "closed"), (0, False, True, "open"), (4.9, True, False, "open"),
        (5, True, True, "half-open"), (6, True, True, "closed"), (7, True, True, "closed"),
    ],
    "a failure while half open opens it again, for the whole pause": [
        (0, False, True, "closed"), (0, False, True, "closed"), (0, False, True, "open"), (5, True, True, "half-open"),
        (6, False, True, "open"), (10, True, False, "open"), (11, True, True, "half-open"),
    ],
    "failures from before it opened are forgotten once it is closed": [
        (0, False, True, "closed"), (0, False, True, "closed"), (0, False, True, "open"), (5, True, True, "half-open"),
        (5, True, True, "closed"), (6, False, True, "closed"), (6, False, True, "closed"), (6, False, True, "open"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_circuit_follows_what_the_handler_does(script: list[tuple[float, bool, bool, str]]):
    circuit = Circuit(POLICY)
    for at_s, ok, called, state in script:
        assert call(circuit, at_s, ok=ok) is called, at_s
        assert circuit.state.value == state, at_s


def opened() -> Circuit:
    circuit = Circuit(POLICY)
    for _ in range(3):
        call(circuit, 0, ok=False)
    assert circuit.state is CircuitState.OPEN
    return circuit


def test_an_open_circuit_says_how_long_it_stays_open():
    assert opened().admit(2 * S) == Blocked(3.0)


def test_no_more_probes_run_at_once_than_it_takes_to_close():
    circuit = opened()
    probes = [circuit.admit(5 * S) for _ in range(4)]
    assert [type(probe) for probe in probes] == [Admitted, Admitted, Blocked, Blocked]
    for probe in probes[:2]:
        assert isinstance(probe, Admitted)
        circuit.succeeded(probe.term)
    assert circuit.state is CircuitState.CLOSED


def test_an_abandoned_probe_makes_room_for_another():
    circuit = opened()
    probes = [circuit.admit(5 * S) for _ in range(2)]
    assert isinstance(circuit.admit(5 * S), Blocked)
    assert isinstance(probes[0], Admitted)
    circuit.abandoned(probes[0].term)
    assert isinstance(circuit.admit(5 * S), Admitted)


def test_an_outcome_that_comes_late_does_not_judge_the_circuit_of_now():
    circuit = Circuit(POLICY)
    late = circuit.admit(0)
    assert isinstance(late, Admitted)
    for _ in range(3):
        call(circuit, 0, ok=False)
    assert isinstance(circuit.admit(5 * S), Admitted)  # half open now
    circuit.failed(late.term, 5 * S)
    circuit.succeeded(late.term)
    circuit.abandoned(late.term)
    assert circuit.state is CircuitState.HALF_OPEN


def test_transitions_are_counted():
    circuit = opened()
    call(circuit, 5, ok=True)
    call(circuit, 5, ok=True)
    assert circuit.transitions == {"open": 1, "half-open": 1, "closed": 1}


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=80))
def test_whatever_happens_a_handler_that_recovers_is_called_again(steps: list[tuple[float, bool]]):
    circuit, at_s = Circuit(POLICY), 0.0
    for pause_s, ok in steps:
        at_s += pause_s
        call(circuit, at_s, ok=ok)
    for _ in range(10):
        at_s += POLICY.open_s
        call(circuit, at_s, ok=True)
    assert circuit.state is CircuitState.CLOSED


@pytest.mark.parametrize(
    "options", [{"failures": 0}, {"successes": 0}, {"window_s": 0.0}, {"open_s": -1.0}, {"while_open": "panic"}]
)
def test_a_policy_that_makes_no_sense_is_refused(options: dict):
    with pytest.raises(RegistrationError, match=next(iter(options))):
        Breaker(**options)
