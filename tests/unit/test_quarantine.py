"""What is concluded from the deaths of workers, and which suspects may run: tables, and lives under fire."""

from __future__ import annotations

import random

import msgspec
import pytest

from shardbus.journal import Journal, journal_bytes
from shardbus.quarantine import (
    PULSE_S,
    SUSPECTS_MAX,
    UNKNOWN_END,
    Convicted,
    Crowded,
    Ended,
    Hold,
    Identity,
    Quarantine,
    Run,
    Scene,
    Suspect,
    UnderWay,
    judge,
    told_after,
)

P = b"p" * 16
S = 1_000_000_000
NOW = 1000 * S


def scene(
    running: tuple[int, int] | None = None,
    suspended: tuple[int, ...] = (),
    suspects: dict[int, Suspect] | None = None,
    began_ns: int = NOW,
    death: int = 5,
    waiting: tuple[int, ...] = (),
) -> Scene:
    return Scene(
        waiting=[UnderWay(P, seq, seq + 1, began_ns) for seq in waiting],
        death=death,
        running=None if running is None else UnderWay(P, *running, began_ns),
        suspended=[UnderWay(P, seq, seq + 1, began_ns) for seq in suspended],
        suspects={(P, seq): one for seq, one in (suspects or {}).items()},
    )


def ended(how: str, told: str = "SIGABRT") -> Ended:
    return Ended(how=how, told=told, at_ns=NOW)  # type: ignore[arg-type]  # the rows name none but those


ONCE = Suspect(died=1)
NOW_TOO = 1 << 5

# the scene, how it ended, and of each suspect afterwards: deaths, how often alone, free, convicted
ROWS: dict[str, tuple[Scene, str, dict[int, tuple[int, int, bool, bool]]]] = {
    "an orderly end accuses nobody": (scene((3, 6)), "", {}),
    "a crash accuses the stretch that ran": (scene((3, 5)), "crashed", {3: (1, 0, False, False), 4: (1, 0, False, False)}),
    "and nobody who was suspended meanwhile": (scene((3, 4), (7, 8)), "crashed", {3: (1, 0, False, False)}),
    "or else all who were suspended": (scene(None, (7, 8)), "crashed", {7: (1, 0, False, False), 8: (1, 0, False, False)}),
    "or else all that had failed and waited": (scene(waiting=(7,)), "crashed", {7: (1, 0, False, False)}),
    "who had failed and waited is suspected beside who ran, whom nobody has suspected before": (
        scene((3, 4), waiting=(7,)), "crashed", {3: (1, 0, False, False), 7: (1, 0, False, False)},
    ),
    "not beside a suspect that ran": (scene((3, 4), waiting=(7,), suspects={3: ONCE}), "crashed", {3: (2, 1, False, True)}),
    "a suspect that had failed and waited alone is convicted": (
        scene(waiting=(7,), suspects={7: ONCE}), "crashed", {7: (2, 1, False, True)},
    ),
    "who waited had no part in a kill from outside": (scene(waiting=(7,)), "killed", {}),
    "nor in a loop that stood still": (scene((3, 4), waiting=(7,)), "silent", {3: (1, 0, False, False)}),
    "one that ran alone for the first time is a suspect only": (scene((3, 4)), "crashed", {3: (1, 0, False, False)}),
    "a suspect that ran alone is convicted": (scene((3, 4), (8,), {3: ONCE}), "crashed", {3: (2, 1, False, True)}),
    "one that was suspended alone, too": (scene(None, (3,), {3: ONCE}), "crashed", {3: (2, 1, False, True)}),
    "among others that are new, not at once": (
        scene(None, (3, 4), {3: ONCE}), "crashed", {3: (2, 1, False, False), 4: (1, 0, False, False)},
    ),
    "nor ever, because each time another new one may have done it": (
        scene(None, (3, 4), {3: Suspect(died=3, alone=9)}), "crashed", {3: (3, 10, False, False), 4: (1, 0, False, False)},
    ),
    "beside one that is free, the second time": (
        scene(None, (3, 4), {3: Suspect(died=3, alone=1), 4: Suspect(died=1, free=True)}),
        "crashed", {3: (3, 2, False, True), 4: (2, 0, True, False)},
    ),
    "beside one whose deaths another explains, never: this death is not explained": (
        scene(None, (3, 4), {3: Suspect(died=3, alone=1), 4: Suspect(died=1, free=True, explained=True)}),
        "crashed", {3: (3, 2, False, False), 4: (2, 0, False, False)},
    ),
    "two suspects under way are both only suspected more": (
        scene(None, (3, 4), {3: ONCE, 4: ONCE}), "crashed", {3: (2, 0, False, False), 4: (2, 0, False, False)},
    ),
    "a conviction explains the deaths of the others": (
        scene((3, 4), (), {3: ONCE, 4: ONCE}), "crashed", {3: (2, 1, False, True), 4: (1, 0, True, False)},
    ),
    "but not another death": (
        scene((3, 4), (), {3: ONCE, 4: Suspect(died=2)}), "crashed", {3: (2, 1, False, True), 4: (1, 0, False, False)},
    ),
    "a free suspect that ran alone is convicted all the same": (
        scene((3, 4), (), {3: Suspect(died=1, free=True)}), "crashed", {3: (2, 1, False, True)},
    ),
    "a convicted one is not judged again": (
        scene(None, (), {3: Suspect(died=3, alone=1, verdict="SIGSEGV")}), "crashed", {3: (2, 1, False, True)},
    ),
    "when memory ran out it may be anybody": (
        scene((3, 4), (8,)), "memory", {3: (1, 0, False, False), 8: (1, 0, False, False)},
    ),
    "and it takes one more death": (scene((3, 4), (), {3: ONCE}), "memory", {3: (2, 1, False, False)}),
    "which convicts": (scene((3, 4), (), {3: Suspect(died=3, alone=1)}), "memory", {3: (3, 2, False, True)}),
    "a loop that stood still accuses who ran": (scene((3, 4), (8,)), "silent", {3: (1, 0, False, False)}),
    "and takes one more death, too": (scene((3, 4), (), {3: ONCE}), "silent", {3: (2, 1, False, False)}),
    "a kill accuses what had just begun": (scene(None, (3,)), "killed", {3: (1, 0, False, False)}),
    "and nothing that had run for long": (scene(None, (3,), began_ns=NOW - S), "killed", {}),
    "one kill of one that is alone convicts nobody": (scene((3, 4), (), {3: ONCE}), "killed", {3: (2, 1, False, False)}),
    "nor do six": (scene((3, 4), (), {3: Suspect(died=15, alone=5)}), "killed", {3: (5, 6, False, False)}),
    "seven in a row do": (scene((3, 4), (), {3: Suspect(died=15, alone=6)}), "killed", {3: (5, 7, False, True)}),
    "a kill without it ends the row": (
        scene(None, (), {3: Suspect(died=15, alone=3)}), "killed", {3: (4, 0, False, False)},
    ),
    "a crash without it does not": (
        scene(None, (), {3: Suspect(died=3, alone=1)}), "crashed", {3: (2, 1, False, False)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("before", "how", "expected"), ROWS.values(), ids=ROWS)
def test_what_a_death_says(before: Scene, how: str, expected: dict[int, tuple[int, int, bool, bool]]):
    after = judge(before, ended(how) if how else UNKNOWN_END)
    found = {seq: (one.deaths, one.alone, one.free, bool(one.verdict)) for (_, seq), one in after.items()}
    assert found == expected


def test_a_kill_that_was_noticed_late_accuses_what_had_just_begun_when_the_worker_last_lived():
    late = scene(None, (3,), began_ns=NOW - 5 * S)
    assert not judge(late, ended("killed"))
    lived = msgspec.structs.replace(late, alive_ns=NOW - 5 * S + S // 20)
    assert list(judge(lived, ended("killed"))) == [(P, 3)]
    assert not judge(msgspec.structs.replace(late, alive_ns=NOW - 4 * S), ended("killed"))


def test_an_end_that_accuses_has_words():
    with pytest.raises(AssertionError):
        judge(scene((3, 4)), Ended(how="crashed", at_ns=NOW))


def test_a_verdict_names_how_the_worker_ended():
    after = judge(scene((3, 4), (), {3: ONCE}), ended("crashed", "exit code 3"))
    assert after[P, 3].verdict == "exit code 3"


def test_the_suspects_are_bounded_and_the_convicted_stay():
    suspects = {seq: Suspect(died=1) for seq in range(SUSPECTS_MAX)} | {9_999: Suspect(died=3, verdict="SIGABRT")}
    after = judge(scene((20_000, 20_016), (), suspects), ended("crashed"))
    assert len(after) == SUSPECTS_MAX
    assert (P, 9_999) in after


# -- who may run


def quarantine(suspects: dict[Identity, Suspect], notes: list[tuple[Identity, Suspect | None]] | None = None) -> Quarantine:
    noted = [] if notes is None else notes
    return Quarantine(suspects, lambda identity, suspect: noted.append((identity, suspect)), NOW, lambda: 0.5)


def test_suspects_run_one_at_a_time_and_others_as_ever():
    one = quarantine({(P, 1): ONCE, (P, 2): ONCE})
    assert one.admit((P, 1), NOW) == Run()
    assert one.admit((P, 2), NOW) == Crowded(1)
    assert one.admit((P, 3), NOW) == Run()
    one.clear((P, 1))
    assert one.room() == 1
    assert one.admit((P, 2), NOW) == Run()


def test_an_eighth_of_many_suspects_runs_at_once():
    one = quarantine({(P, seq): ONCE for seq in range(1000)})
    assert sum(one.admit((P, seq), NOW) == Run() for seq in range(1000)) == 125


def test_those_that_most_deaths_speak_against_say_how_many():
    suspects = {(P, seq): ONCE for seq in range(1000)} | {(P, seq): Suspect(died=3) for seq in range(16)}
    one = quarantine(suspects)
    assert one.room() == 2
    for seq in range(16):
        one.clear((P, seq))
    assert one.room() == 123


def test_a_convicted_one_never_runs_and_one_that_was_alone_waits_a_while():
    one = quarantine({(P, 1): Suspect(died=3, alone=1, verdict="SIGABRT"), (P, 2): Suspect(died=3, alone=1)})
    assert one.admit((P, 1), NOW) == Convicted("SIGABRT", 2)
    assert one.admit((P, 2), NOW) == Hold(1.1)
    assert one.admit((P, 2), NOW) == Run(alone_s=1.0)
    assert one.admit((P, 2), NOW) == Run()  # it has waited in vain to be alone


def test_a_suspect_that_runs_for_long_makes_room():
    notes: list[tuple[Identity, Suspect | None]] = []
    one = quarantine({(P, 1): ONCE, (P, 2): ONCE}, notes)
    assert one.admit((P, 1), NOW) == Run()
    one.tick(NOW + 4 * S)
    assert one.admit((P, 2), NOW + 4 * S) == Crowded(1)
    one.tick(NOW + 5 * S)
    assert one.admit((P, 2), NOW + 5 * S) == Run()
    assert notes == [((P, 1), Suspect(died=1, free=True))]


def test_a_suspect_that_is_postponed_makes_room_and_stays_a_suspect():
    one = quarantine({(P, 1): Suspect(died=3, alone=1), (P, 2): ONCE})
    assert one.admit((P, 1), NOW) == Hold(1.1)
    assert one.admit((P, 1), NOW) == Run(alone_s=1.0)
    one.pause((P, 1))
    assert one.admit((P, 2), NOW) == Run()
    assert one.admit((P, 1), NOW) == Hold(1.1)  # each attempt begins at an instant of chance
    assert one.admit((P, 1), NOW) == Crowded(2)
    one.clear((P, 2))
    assert one.admit((P, 1), NOW) == Run(alone_s=1.0)
    one.pause((P, 1))
    one.clear((P, 1))
    assert (one.room(), one.suspects) == (1, {})


def test_a_suspect_that_does_not_come_is_forgotten():
    one = quarantine({(P, 1): ONCE, (P, 2): ONCE})
    assert one.admit((P, 1), NOW) == Run()
    one.tick(NOW + 60 * S)
    assert list(one.suspects) == [(P, 1)]


def test_a_convicted_one_that_does_not_come_is_not_forgotten():
    one = quarantine({(P, 1): Suspect(died=3, verdict="SIGABRT")})
    one.tick(NOW + 600 * S)
    assert one.admit((P, 1), NOW) == Convicted("SIGABRT", 2)


def test_after_a_kill_from_outside_nobody_waits_to_be_alone():
    one = quarantine({})
    one.adopt({(P, 1): Suspect(died=3, alone=1)}, NOW, solos=False)
    assert one.admit((P, 1), NOW) == Hold(1.1)
    assert one.admit((P, 1), NOW) == Run()


def test_a_batch_with_a_suspect_is_known():
    one = quarantine({(P, 5): ONCE})
    assert one.touches(P, 0, 6)
    assert not one.touches(P, 6, 9)
    assert not one.touches(b"q" * 16, 0, 6)


# -- lives under fire


def live(chance: random.Random, deaths: int, poison: int | None, lifetime_s: float, slow: int) -> tuple[int | None, int]:
    """Lives of a worker whose `slow` handlers sleep, by journal and quarantine; the one of `poison` kills it at once.

    Somebody kills it too, after `lifetime_s` on average. Returns who is convicted first, and how many deaths that took.
    """
    journal = Journal(memoryview(bytearray(journal_bytes(suspended=64, suspects=64))), suspended=64, suspects=64)
    now_ns = NOW
    left = set(range(slow))  # unfinished messages; new ones take their places
    serial = slow
    end = UNKNOWN_END
    for death in range(deaths):
        suspects = judge(journal.scene(), end)
        journal.start_over(suspects)
        one = Quarantine({}, journal.note, now_ns, chance.random)
        one.adopt(suspects, now_ns, solos=False)
        kill_ns = now_ns + int(chance.expovariate(1 / lifetime_s) * S)
        due = [(now_ns, seq) for seq in left]
        running: dict[int, tuple[int, int]] = {}  # message → when it ends, row
        while True:
            due.sort()
            ends_ns, ending = min(((at_ns, seq) for seq, (at_ns, _) in running.items()), default=(2**63, -1))
            at_ns, seq = due[0] if due else (2**63, -1)
            now_ns = min(at_ns, ends_ns, kill_ns)
            if now_ns == kill_ns:
                journal.pulse(now_ns - int(chance.random() * PULSE_S * S))
                end = Ended(how="killed", told="SIGKILL", at_ns=now_ns)
                break
            if now_ns == ends_ns:
                journal.resume(running.pop(ending)[1])
                one.clear((P, ending))
                left.discard(ending)
                left.add(serial)
                due.append((now_ns, serial))
                serial += 1
                continue
            del due[0]
            match one.admit((P, seq), now_ns):
                case Convicted():
                    return seq, death
                case Hold(delay_s=delay_s):
                    due.append((now_ns + int(delay_s * S), seq))
                case Crowded():
                    due.append((now_ns + S // 5, seq))
                case Run() if seq == poison:
                    journal.lead(P, seq, seq + 1, now_ns)
                    journal.pulse(now_ns)
                    end = Ended(how="killed", told="SIGKILL", at_ns=now_ns + S // 2)  # noticed late
                    break
                case Run():
                    running[seq] = (now_ns + int(chance.uniform(0.05, 3.0) * S), journal.suspend(P, seq, now_ns))
        journal = Journal(journal._words.cast("B"), suspended=64, suspects=64)  # as the next process finds it
    return None, deaths


@pytest.mark.parametrize("lifetime_s", [0.05, 0.3, 1.0, 5.0])
def test_a_thousand_kills_from_outside_convict_nobody(lifetime_s: float):
    assert live(random.Random(lifetime_s), 1000, None, lifetime_s, 10) == (None, 1000)


def test_one_that_kills_its_process_by_sigkill_is_found_all_the_same():
    convicted, deaths = live(random.Random(1), 100, 7, 1e6, 20)
    assert convicted == 7
    assert deaths <= 10


# -- the journal


def journal_over(buffer: bytearray) -> Journal:
    return Journal(memoryview(buffer), suspended=4, suspects=4)


def buffer_of_journal() -> bytearray:
    return bytearray(journal_bytes(suspended=4, suspects=4))


def test_a_successor_reads_what_was_under_way():
    buffer = buffer_of_journal()
    journal = journal_over(buffer)
    journal.lead(P, 10, 20, 7)
    row = journal.suspend(b"q" * 16, 0, 8)
    journal.resume(journal.suspend(P, 3, 9))
    found = journal_over(buffer).scene()
    assert found.running == UnderWay(P, 10, 20, 7)
    assert found.suspended == [UnderWay(b"q" * 16, 0, 1, 8)]
    journal.resume(row)
    journal.rest()
    found = journal_over(buffer).scene()
    assert (found.running, found.suspended) == (None, [])


def test_suspects_outlive_incarnations_and_what_was_under_way_does_not():
    buffer = buffer_of_journal()
    journal = journal_over(buffer)
    journal.scene()
    journal.lead(P, 1, 2)
    journal.suspend(P, 3, 9)
    suspects = {(P, 1): Suspect(died=5, alone=1, verdict="exit code 3"), (P, 2**61): Suspect(died=1 << 63, free=True)}
    suspects[P, 7] = Suspect(died=2, free=True, explained=True)
    journal.start_over(suspects)
    found = journal_over(buffer).scene()
    assert found == Scene(death=1, running=None, suspended=[], suspects=suspects)


def test_a_full_journal_counts_what_it_does_not_take():
    journal = journal_over(buffer_of_journal())
    journal.scene()
    assert [journal.suspend(P, seq, 1) for seq in range(6)] == [0, 1, 2, 3, -1, -1]
    for seq in range(6):
        journal.note((P, seq), ONCE)
    assert len(journal.scene().suspects) == 4
    journal.tell(3, 1)
    assert journal.counts() == (3, 1, 2)
    assert journal.names_somebody()


def test_another_layout_is_started_over():
    buffer = buffer_of_journal()
    journal_over(buffer).lead(P, 1, 2)
    buffer[8] = 99
    assert journal_over(buffer).scene().running is None


@pytest.mark.parametrize(
    ("suspected", "convicted", "told"),
    [
        (0, 0, "no message is suspected"),
        (1, 0, "1 message was under way and runs alone now to see whether it ends workers"),
        (0, 1, "1 message was found to end workers, and becomes a dead letter without running again"),
    ],
)
def test_what_follows_from_a_death_is_told_so_that_people_understand_it(suspected: int, convicted: int, told: str) -> None:
    assert told_after(suspected, convicted) == told


def test_several_are_told_as_several() -> None:
    assert told_after(9, 2) == (
        "9 messages were under way and run alone now, a few at a time, to see whether one of them ends workers; "
        "2 messages were found to end workers, and become dead letters without running again"
    )


def test_an_event_that_blocks_its_loop_for_good_costs_three_workers() -> None:
    """As README says: nobody is known as a suspect in the first death, and in the next two it is alone."""
    suspects: dict[tuple[bytes, int], Suspect] = {}
    for death in range(1, 4):
        scene = Scene(death=death, running=UnderWay(b"p", 7, 8, 0), suspended=[], suspects=suspects)
        suspects = judge(scene, Ended(how="silent", told="SIGKILL, after 5 s of silence"))
        assert bool(suspects[b"p", 7].verdict) == (death == 3)


def test_what_failed_and_waits_stands_in_the_journal_until_it_runs_again_and_leaves_room_for_handlers():
    journal = Journal(memoryview(bytearray(journal_bytes(suspended=4, suspects=2))), suspended=4, suspects=2)
    rows = [journal.wait(P, seq, NOW) for seq in (7, 8, 9)]
    assert rows[2] == -1  # half of the rows are for handlers that are suspended
    assert journal.names_somebody()
    row = journal.suspend(P, 3, NOW)
    found = journal.scene()
    assert [one.identities for one in found.waiting] == [[(P, 7)], [(P, 8)]]
    assert [one.identities for one in found.suspended] == [[(P, 3)]]
    for one in (row, *rows[:2]):
        journal.resume(one)
    assert not journal.names_somebody()
