"""nlu.admission: what was measured decides, quickly and not for ever."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from nlu import admission
from nlu.admission import Admission, Average, Costs, Turns, pause_ms
from nlu.errors import Overloaded, TooLate

FOREVER = 3600.0


class Clock(SimpleNamespace):
    """The time module as admission sees it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(admission, "time", made)
    return made


class Lag:
    """How late the event loop is said to be."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def of(*, workers: int = 2, queue_s: float = 0.1, lag: Lag | None = None) -> Admission:
    return Admission(workers=workers, queue_s=queue_s, lag_s=lag or Lag())


def measured(clock: Clock, seconds: float, *, workers: int = 2, queue_s: float = 0.1) -> Admission:
    """One that has seen a hundred phrases of so many seconds."""
    made = of(workers=workers, queue_s=queue_s)
    observe(made, clock, seconds, 100)
    return made


def observe(made: Admission, clock: Clock, seconds: float, times: int, *, phrases: int = 1) -> None:
    for _ in range(times):
        clock.now += seconds
        made.observe(seconds, phrases)


# --- the averages ---


def test_admission_average_begins_with_the_first_measurement() -> None:
    average = Average()
    average.observe(0.2)
    assert average.seconds == 0.2


@pytest.mark.parametrize("times", [10.0, 0.1])
def test_admission_average_follows_a_change_within_fifty_measurements(times: float) -> None:
    average = Average(0.01)
    for _ in range(50):
        average.observe(0.01 * times)
    assert average.seconds == pytest.approx(0.01 * times, rel=0.06)


def test_admission_average_is_not_carried_away_by_one_stall() -> None:
    """Ten seconds after thousands of 4 ms: without the bound it would be more than a second."""
    average = Average(0.004)
    average.observe(10.0)
    assert average.seconds < 0.006
    unbounded = 0.004 + 0.1 * (10.0 - 0.004)
    assert unbounded > 1.0  # the control


def test_admission_service_time_is_of_one_phrase(clock: Clock) -> None:
    made = of()
    observe(made, clock, 0.08, 100, phrases=16)
    assert made.service_s == pytest.approx(0.005)


def test_admission_95th_percentile_is_of_the_newest_runs(clock: Clock) -> None:
    made = of()
    random = np.random.default_rng(0)
    for seconds in random.uniform(0.010, 0.020, 500):
        observe(made, clock, float(seconds), 1)
    assert 0.0185 < made.p95_s < 0.020
    observe(made, clock, 0.002, 64)
    assert made.p95_s == 0.002


def test_admission_95th_percentile_forgets_with_time(clock: Clock) -> None:
    made = of()
    observe(made, clock, 1.0, 3)
    clock.now += 6.0
    observe(made, clock, 0.004, 1)
    assert made.p95_s == 0.004


# --- admit ---


@pytest.mark.parametrize(
    ("ahead", "wanted", "admitted"),
    [(2, 1, True), (2, 18, True), (19, 1, True), (2, 19, False), (20, 1, False)],
)
def test_admission_takes_what_waits_no_longer_than_it_may(
    clock: Clock, ahead: int, wanted: int, admitted: bool
) -> None:
    """10 ms each on two workers: 20 phrases take the 100 ms there are."""
    made = measured(clock, 0.01)
    if admitted:
        made.admit(ahead, wanted, FOREVER)
    else:
        with pytest.raises(Overloaded) as refused:
            made.admit(ahead, wanted, FOREVER)
        assert 105 <= refused.value.retry_after_ms <= 1.5 * 105


@pytest.mark.parametrize("seconds", [0.001, 0.01, 0.04])
def test_admission_bound_follows_the_model(clock: Clock, seconds: float) -> None:
    made = measured(clock, 0.01)
    observe(made, clock, seconds, 100)
    room = round(0.1 / seconds * 2)
    made.admit(room - 2, 1, FOREVER)
    with pytest.raises(Overloaded):
        made.admit(room, 1, FOREVER)


@pytest.mark.parametrize("ahead", [0, 1])
def test_admission_what_finds_a_worker_idle_waits_for_nobody(clock: Clock, ahead: int) -> None:
    """A model that takes longer than anybody may wait still serves as many calls as it has workers."""
    made = measured(clock, 0.5)
    made.admit(ahead, 1, FOREVER)
    with pytest.raises(Overloaded):
        made.admit(2, 1, FOREVER)  # the control


def test_admission_refuses_what_the_deadline_leaves_no_time_for(clock: Clock) -> None:
    made = measured(clock, 0.01)
    made.admit(10, 2, 0.0651)  # eleven phrases on two workers, and the 95th percentile of the last
    with pytest.raises(Overloaded, match="more than the deadline leaves"):
        made.admit(10, 2, 0.0649)


def test_admission_says_too_late_where_no_pause_would_help(clock: Clock) -> None:
    made = measured(clock, 0.01)
    for ahead in (0, 10):
        with pytest.raises(TooLate):
            made.admit(ahead, 4, 0.0199)  # four on two workers
    made.admit(0, 4, 0.0201)
    with pytest.raises(Overloaded):
        made.admit(10, 4, 0.0201)


def test_admission_an_idle_worker_tries_what_mostly_succeeds(clock: Clock) -> None:
    """One run in five takes ten times as long; that is no reason to leave a worker idle, but one not to wait."""
    made = of()
    for _ in range(50):
        observe(made, clock, 0.01, 4)
        observe(made, clock, 0.04, 1)
    assert made.p95_s == 0.04
    made.admit(1, 1, 0.03)
    with pytest.raises(Overloaded):
        made.admit(2, 1, 0.03)


def test_admission_takes_all_until_something_was_measured(clock: Clock) -> None:
    made = of()
    made.admit(1000, 1000, 0.0)
    observe(made, clock, 0.01, 1)
    with pytest.raises(Overloaded):
        made.admit(1000, 1000, FOREVER)  # the control


def test_admission_an_idle_server_that_measured_nothing_lately_tries(clock: Clock) -> None:
    """Else an estimate from a slow spell, too long for every caller's deadline, would stay for ever."""
    made = measured(clock, 1.0)
    with pytest.raises(TooLate):
        made.admit(0, 1, 0.2)  # the control
    clock.now += 1.1
    made.admit(0, 1, 0.2)
    observe(made, clock, 0.004, 1)
    with pytest.raises(TooLate):
        made.admit(0, 1, 0.2)  # one look is not enough, and every second there is another


def test_admission_recovers_from_a_slow_spell_by_its_tries_alone(clock: Clock) -> None:
    made = measured(clock, 0.3)
    for _ in range(10):
        clock.now += 1.1
        made.admit(0, 1, 0.2)
        observe(made, clock, 0.004, 1)
    made.admit(0, 1, 0.2)


def test_admission_sheds_by_the_lag_of_the_event_loop(clock: Clock) -> None:
    lag = Lag()
    made = of(lag=lag)
    observe(made, clock, 0.001, 100)
    made.admit(0, 1, FOREVER)
    lag.seconds = 0.15
    with pytest.raises(Overloaded) as refused:
        made.admit(0, 1, FOREVER)
    assert refused.value.retry_after_ms >= 150
    lag.seconds = 0.0
    made.admit(0, 1, FOREVER)


def test_admission_pauses_differ_and_are_never_shorter() -> None:
    pauses = {pause_ms(0.1) for _ in range(200)}
    assert len(pauses) > 20
    assert 100 <= min(pauses)
    assert max(pauses) <= 150
    assert pause_ms(0.0) == 1


# --- costs ---

DROPS = ("replies", "boosted", "context", "token")


def costs() -> Costs:
    """1 ms each, and 2 that cannot be left out."""
    made = Costs()
    for stage in DROPS:
        made.observe(stage, 0.001)
    made.observe("sentence", 0.002)
    return made


STAGES = frozenset((*DROPS, "sentence", "rules"))


@pytest.mark.parametrize("left", range(5))
def test_admission_costs_leave_out_in_order_until_the_rest_fits(left: int) -> None:
    assert costs().left_out(STAGES, DROPS, 0.0061 - 0.001 * left) == frozenset(DROPS[:left])


def test_admission_costs_leave_out_all_there_is_where_nothing_fits() -> None:
    assert costs().left_out(STAGES, DROPS, 0.0001) == frozenset(DROPS)


def test_admission_costs_count_only_what_is_asked() -> None:
    assert costs().left_out({"token", "sentence"}, DROPS, 0.0031) == frozenset()
    assert costs().left_out({"token", "sentence"}, DROPS, 0.0029) == {"token"}


def test_admission_costs_leave_out_only_what_may_be() -> None:
    assert costs().left_out(STAGES, ("token",), 0.0001) == {"token"}
    assert costs().left_out(STAGES, (), 0.0001) == frozenset()


def test_admission_costs_know_nothing_at_first() -> None:
    assert Costs().left_out(STAGES, DROPS, 0.0) == frozenset()


def test_admission_costs_of_what_is_always_left_out_are_tried_again() -> None:
    """A cost that was measured in a bad moment, and is longer than every caller's time."""
    made = Costs()
    made.observe("replies", 0.02)
    for _ in range(500):
        if not made.left_out({"replies"}, DROPS, 0.01):
            break
        made.left("replies")
    assert not made.left_out({"replies"}, DROPS, 0.01)


# --- turns of the event loop ---


async def rounds(counted: list[int]) -> None:
    """Count the turns of the event loop."""
    while True:
        counted[0] += 1
        await asyncio.sleep(0)


@pytest.mark.parametrize(("seconds", "waits"), [(0.0001, False), (0.003, True)])
async def test_admission_turn_that_is_spent_goes_to_the_others(seconds: float, waits: bool) -> None:
    turns, counted = Turns(), [0]
    others = asyncio.create_task(rounds(counted))
    turns.spend(seconds)
    await turns.mine()
    assert (counted[0] > 0) == waits
    others.cancel()


async def test_admission_many_small_pieces_are_spread_over_turns() -> None:
    turns, counted = Turns(), [0]
    others = asyncio.create_task(rounds(counted))
    for _ in range(1000):
        await turns.mine()
        turns.spend(0.0001)
    others.cancel()
    assert 30 <= counted[0] <= 100  # of 1000 pieces, some twenty in a turn
