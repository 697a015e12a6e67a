"""nlu.batcher: bounded, in order, nothing computed in vain, and an answer for every waiter whatever the model does."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

import numpy as np
import pytest

from annotators.annotator import Encoding
from nlu.batcher import STUCK_S, Batcher, Ticket
from nlu.errors import Draining, EncodeFailed, NluError, Overloaded, Stuck, TooLate

FAR = time.monotonic() + 3600


class Model:
    """Encodes a phrase to [number of code points, tokens asked for]; remembers its batches; waits while held."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.open = threading.Event()
        self.open.set()
        self.busy = threading.Event()  # set once a batch is inside

    def __call__(self, phrases: Sequence[str], tokens: bool) -> list[Encoding]:
        self.batches.append(list(phrases))
        self.busy.set()
        if not self.open.wait(20):
            raise RuntimeError("nobody let the model go")
        if "poison" in phrases:
            raise ValueError("a phrase this model cannot take")
        return [Encoding(np.array([len(phrase), tokens], np.float32)) for phrase in phrases]

    @property
    def seen(self) -> list[str]:
        return [phrase for batch in self.batches for phrase in batch]

    def hold(self) -> None:
        self.open.clear()
        self.busy.clear()


Make = Callable[..., Awaitable[Batcher]]


@pytest.fixture
def model() -> Iterator[Model]:
    made = Model()
    yield made
    made.open.set()  # no thread of a failed test may stay behind


@pytest.fixture
async def batcher_of(model: Model) -> AsyncIterator[Make]:
    """Makes batchers over `model` and closes them."""
    made: list[Batcher] = []

    async def make(
        *, workers: int = 1, limit: int = 100, max_batch: int = 1, queue_s: float = math.inf
    ) -> Batcher:
        made.append(Batcher(model, workers=workers, limit=limit, max_batch=max_batch, queue_s=queue_s))
        return made[-1]

    yield make
    model.open.set()
    for batcher in made:
        await batcher.close()


async def occupied(batcher: Batcher, model: Model, phrase: str = "first") -> Ticket:
    """A ticket whose phrase the held model is working on."""
    model.hold()
    ticket = submit(batcher, phrase)
    await asyncio.to_thread(model.busy.wait, 20)
    return ticket


def submit(batcher: Batcher, phrase: str, *, deadline: float = FAR, tokens: bool = False) -> Ticket:
    """Taken on in good time, whatever becomes of its deadline."""
    ticket = batcher.submit([phrase], tokens=tokens, deadline=FAR)[0]
    ticket.deadline = deadline
    return ticket


async def answers(tickets: Sequence[Ticket]) -> list[Encoding | BaseException]:
    return await asyncio.wait_for(asyncio.gather(*(t.future for t in tickets), return_exceptions=True), 20)


def kinds(found: Sequence[Encoding | BaseException]) -> list[type]:
    return [type(answer) for answer in found]


@pytest.mark.parametrize("max_batch", [1, 4, 100])
@pytest.mark.parametrize("workers", [1, 3])
async def test_batcher_answers_each_ticket_with_its_own_phrase(
    batcher_of: Make, workers: int, max_batch: int
) -> None:
    batcher = await batcher_of(workers=workers, max_batch=max_batch)
    found = await answers([submit(batcher, "x" * length) for length in range(1, 60)])
    assert [answer.sentence[0] for answer in found if isinstance(answer, Encoding)] == list(range(1, 60))


@pytest.mark.parametrize("max_batch", [1, 3])
async def test_batcher_takes_phrases_in_order(batcher_of: Make, model: Model, max_batch: int) -> None:
    batcher = await batcher_of(max_batch=max_batch)
    phrases = [f"phrase {i}" for i in range(20)]
    await answers([submit(batcher, phrase) for phrase in phrases])
    assert model.seen == phrases


async def test_batcher_gathers_while_the_model_is_busy(batcher_of: Make, model: Model) -> None:
    batcher = await batcher_of(max_batch=4)
    first = await occupied(batcher, model)
    tickets = [submit(batcher, f"{i}") for i in range(6)]
    model.open.set()
    await answers([first, *tickets])
    assert model.batches == [["first"], ["0", "1", "2", "3"], ["4", "5"]]


async def test_batcher_runs_alone_where_a_batch_gains_nothing(batcher_of: Make, model: Model) -> None:
    batcher = await batcher_of(max_batch=1)
    await answers([submit(batcher, f"{i}") for i in range(5)])
    assert [len(batch) for batch in model.batches] == [1] * 5


async def test_batcher_workers_run_side_by_side(batcher_of: Make) -> None:
    """Two batches meet at a barrier that one alone would never pass."""
    barrier = threading.Barrier(2, timeout=20)

    def encode(phrases: Sequence[str], tokens: bool) -> list[Encoding]:
        barrier.wait()
        return [Encoding(np.zeros(2, np.float32)) for _ in phrases]

    batcher = Batcher(encode, workers=2, limit=10)
    assert kinds(await answers([submit(batcher, "a"), submit(batcher, "b")])) == [Encoding, Encoding]
    await batcher.close()


@pytest.mark.parametrize(
    ("asked", "given"), [((False, False), 0.0), ((False, True), 1.0), ((True, True), 1.0)]
)
async def test_batcher_computes_tokens_where_one_of_a_batch_asks(
    batcher_of: Make, asked: tuple[bool, bool], given: float
) -> None:
    batcher = await batcher_of(max_batch=2)
    found = await answers([submit(batcher, "x", tokens=tokens) for tokens in asked])
    assert [answer.sentence[1] for answer in found if isinstance(answer, Encoding)] == [given, given]


@pytest.mark.parametrize("extra", [0, 1, 7])
@pytest.mark.parametrize("limit", [1, 5])
async def test_batcher_refuses_exactly_what_is_over_its_limit(
    batcher_of: Make, limit: int, extra: int
) -> None:
    batcher = await batcher_of(limit=limit)
    taken: list[Ticket] = []
    refused: list[Overloaded] = []
    for i in range(limit + extra):
        try:
            taken.append(submit(batcher, f"{i}"))
        except Overloaded as error:
            refused.append(error)
    assert (len(taken), len(refused), batcher.waiting) == (limit, extra, limit)
    assert all(error.retry_after_ms >= 1 for error in refused)
    assert kinds(await answers(taken)) == [Encoding] * limit


async def test_batcher_a_busy_model_holds_none_of_the_places(batcher_of: Make, model: Model) -> None:
    batcher = await batcher_of(limit=3)
    first = await occupied(batcher, model)
    tickets = [submit(batcher, f"{i}") for i in range(3)]
    with pytest.raises(Overloaded, match="3 phrases are waiting already, and 3 may"):
        submit(batcher, "one too many")
    model.open.set()
    assert kinds(await answers([first, *tickets])) == [Encoding] * 4


@pytest.mark.parametrize(("limit", "workers", "pause"), [(1, 1, 5), (100, 1, 500), (100, 4, 125)])
async def test_batcher_asks_for_a_pause_as_long_as_its_queue(
    batcher_of: Make, limit: int, workers: int, pause: int
) -> None:
    """Before anything was measured a phrase is taken to cost 5 ms."""
    batcher = await batcher_of(limit=limit, workers=workers)
    tickets = [submit(batcher, "x") for _ in range(limit)]
    with pytest.raises(Overloaded) as refused:
        submit(batcher, "x")
    assert pause <= refused.value.retry_after_ms <= 1.5 * pause
    await answers(tickets)


async def test_batcher_has_room_again_once_it_caught_up(batcher_of: Make) -> None:
    batcher = await batcher_of(limit=1)
    ticket = submit(batcher, "a")
    with pytest.raises(Overloaded):
        submit(batcher, "b")
    await answers([ticket])
    assert kinds(await answers([submit(batcher, "b")])) == [Encoding]


@pytest.mark.parametrize("max_batch", [1, 8])
async def test_batcher_late_tickets_never_reach_the_model(
    batcher_of: Make, model: Model, max_batch: int
) -> None:
    batcher = await batcher_of(max_batch=max_batch)
    first = await occupied(batcher, model)
    tickets = [submit(batcher, "late", deadline=time.monotonic()), submit(batcher, "in time")]
    model.open.set()
    assert kinds(await answers([first, *tickets])) == [Encoding, TooLate, Encoding]
    assert model.seen == ["first", "in time"]
    assert (batcher.computed, batcher.dropped) == (2, 1)


@pytest.mark.parametrize("max_batch", [1, 8])
async def test_batcher_cancelled_tickets_never_reach_the_model(
    batcher_of: Make, model: Model, max_batch: int
) -> None:
    batcher = await batcher_of(max_batch=max_batch)
    first = await occupied(batcher, model)
    tickets = [submit(batcher, "cancelled"), submit(batcher, "wanted")]
    tickets[0].future.cancel()
    model.open.set()
    assert kinds(await answers([first, *tickets])) == [Encoding, asyncio.CancelledError, Encoding]
    assert model.seen == ["first", "wanted"]
    assert (batcher.computed, batcher.dropped) == (2, 1)


async def test_batcher_a_deadline_may_move_while_a_ticket_waits(batcher_of: Make, model: Model) -> None:
    batcher = await batcher_of()
    first = await occupied(batcher, model)
    ticket = submit(batcher, "late", deadline=time.monotonic())
    ticket.deadline = FAR
    model.open.set()
    assert kinds(await answers([first, ticket])) == [Encoding, Encoding]


async def test_batcher_a_ticket_cancelled_inside_the_model_harms_nobody(
    batcher_of: Make, model: Model
) -> None:
    batcher = await batcher_of(max_batch=4)
    first = await occupied(batcher, model)
    first.future.cancel()
    second = submit(batcher, "second")
    model.open.set()
    assert kinds(await answers([second])) == [Encoding]


@pytest.mark.parametrize("max_batch", [1, 2, 8])
async def test_batcher_a_poison_phrase_fails_alone(
    batcher_of: Make, model: Model, caplog: pytest.LogCaptureFixture, max_batch: int
) -> None:
    caplog.set_level(logging.CRITICAL, "nlu.batcher")
    batcher = await batcher_of(max_batch=max_batch)
    first = await occupied(batcher, model)
    tickets = [submit(batcher, phrase) for phrase in ("a", "bb", "poison", "dddd")]
    model.open.set()
    found = await answers([first, *tickets])
    assert kinds(found) == [Encoding, Encoding, Encoding, EncodeFailed, Encoding]
    assert isinstance(found[3], EncodeFailed)
    assert isinstance(found[3].__cause__, ValueError)
    assert [answer.sentence[0] for answer in found if isinstance(answer, Encoding)] == [5, 1, 2, 4]


async def test_batcher_late_batchmates_of_poison_are_not_run_again(batcher_of: Make, model: Model) -> None:
    batcher = await batcher_of(max_batch=8)
    model.hold()
    phrases = ["poison", "cancelled", "late", "fine"]
    poison, cancelled, late, fine = (submit(batcher, phrase) for phrase in phrases)
    await asyncio.to_thread(model.busy.wait, 20)
    cancelled.future.cancel()
    late.deadline = time.monotonic()
    model.open.set()
    assert kinds(await answers([poison, late, fine])) == [EncodeFailed, TooLate, Encoding]
    assert model.batches == [phrases, ["poison"], ["fine"]]


async def test_batcher_never_logs_the_phrase(batcher_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    batcher = await batcher_of()
    await answers([submit(batcher, "poison")])
    assert "a phrase of 6 code points" in caplog.text
    assert "poison" not in caplog.text


@pytest.mark.parametrize("max_batch", [1, 4])
@pytest.mark.parametrize("count", [0, 1, 3, 9], ids="{}-answers".format)
async def test_batcher_a_wrong_number_of_encodings_fails_its_members(max_batch: int, count: int) -> None:
    """Two phrases, and a model that answers with `count` encodings whatever it is asked."""
    batcher = Batcher(
        lambda phrases, tokens: [Encoding(np.zeros(2, np.float32))] * count,
        workers=1,
        limit=9,
        max_batch=max_batch,
    )
    found = await answers([submit(batcher, "a"), submit(batcher, "b")])
    assert (
        kinds(found) == [Encoding if count == 1 else EncodeFailed] * 2
    )  # one each, asked one by one, is right
    await batcher.close()


@pytest.mark.parametrize(
    "error", [ValueError("x"), MemoryError(), RecursionError(), TimeoutError()], ids=repr
)
async def test_batcher_worker_survives(error: Exception) -> None:
    def encode(phrases: Sequence[str], tokens: bool) -> list[Encoding]:
        if "bad" in phrases:
            raise error
        return [Encoding(np.zeros(2, np.float32)) for _ in phrases]

    batcher = Batcher(encode, workers=1, limit=9)
    assert kinds(await answers([submit(batcher, "bad")])) == [EncodeFailed]
    assert kinds(await answers([submit(batcher, "good")])) == [Encoding]
    await batcher.close()


async def test_batcher_close_answers_everybody(batcher_of: Make, model: Model) -> None:
    batcher = await batcher_of(max_batch=2)
    first = await occupied(batcher, model)
    tickets = [submit(batcher, f"{i}") for i in range(5)]
    await batcher.close()
    assert kinds(await answers([first, *tickets])) == [Draining] * 6
    assert model.seen == ["first"]


async def test_batcher_close_answers_the_batchmates_of_poison() -> None:
    """The batch has failed and is being run again one by one when the server stops."""
    alone, go = threading.Event(), threading.Event()

    def encode(phrases: Sequence[str], tokens: bool) -> list[Encoding]:
        if len(phrases) > 1:
            raise ValueError("one of you is poison")
        alone.set()
        go.wait(20)
        return [Encoding(np.zeros(2, np.float32))]

    batcher = Batcher(encode, workers=1, limit=9, max_batch=3)
    tickets = [submit(batcher, phrase) for phrase in ("a", "b", "c")]
    await asyncio.to_thread(alone.wait, 20)
    await batcher.close()
    go.set()
    assert kinds(await answers(tickets)) == [Draining] * 3


async def test_batcher_closed_takes_no_more(batcher_of: Make) -> None:
    batcher = await batcher_of()
    await batcher.close()
    with pytest.raises(Draining):
        submit(batcher, "x")


async def test_batcher_may_be_closed_twice(batcher_of: Make) -> None:
    batcher = await batcher_of()
    await batcher.close()
    await batcher.close()


async def test_batcher_every_ticket_of_a_storm_is_answered(batcher_of: Make, model: Model) -> None:
    """Poison, deadlines and cancellations at random: whatever happens, each waiter hears exactly one thing."""
    random = np.random.default_rng(0)
    batcher = await batcher_of(workers=3, limit=40, max_batch=4)
    tickets: list[Ticket] = []
    refused = 0
    for i in range(600):
        try:
            late = random.random() < 0.2
            phrase = "poison" if random.random() < 0.1 else f"{i}"
            tickets.append(submit(batcher, phrase, deadline=time.monotonic() if late else FAR))
        except Overloaded:
            refused += 1
        if tickets and random.random() < 0.1:
            tickets[int(random.integers(len(tickets)))].future.cancel()
        if random.random() < 0.1:
            await asyncio.sleep(0.001)
    found = await answers(tickets)
    assert len(found) + refused == 600
    assert set(kinds(found)) == {Encoding, TooLate, EncodeFailed, asyncio.CancelledError}
    assert batcher.waiting == 0


# --- all of a request, or none of it ---


def submit_all(batcher: Batcher, phrases: Sequence[str], *, deadline: float = FAR) -> list[Ticket]:
    return batcher.submit(phrases, tokens=False, deadline=deadline)


async def test_batcher_takes_all_phrases_of_a_request_or_none(batcher_of: Make, model: Model) -> None:
    batcher = await batcher_of(limit=5)
    first = await occupied(batcher, model)
    three = submit_all(batcher, ["a", "b", "c"])
    with pytest.raises(Overloaded):
        submit_all(batcher, ["d", "e", "f"])
    assert batcher.waiting == 3
    two = submit_all(batcher, ["g", "h"])  # the control: there was room for two
    model.open.set()
    await answers([first, *three, *two])
    assert model.seen == ["first", "a", "b", "c", "g", "h"]


async def test_batcher_refuses_what_would_wait_too_long(batcher_of: Make, model: Model) -> None:
    """At 5 ms each on one worker: the place in the queue counts, and what is in the model too."""
    batcher = await batcher_of(queue_s=0.05)
    await taking(batcher, 0.005)
    first = await occupied(batcher, model)
    nine = submit_all(batcher, [f"{i}" for i in range(9)])
    with pytest.raises(Overloaded, match="of work are waiting already"):
        submit_all(batcher, ["one too many"])
    assert batcher.wait_s(0) == pytest.approx(0.05)
    model.open.set()
    await answers([first, *nine])
    assert batcher.wait_s(0) == 0.0


async def test_batcher_computes_no_row_for_a_deadline_that_cannot_be_met(
    batcher_of: Make, model: Model
) -> None:
    batcher = await batcher_of(workers=2)
    await taking(batcher, 0.005)
    for i in range(200):
        with pytest.raises(TooLate):
            submit_all(batcher, [f"{i}"], deadline=time.monotonic() + 0.001)
    ticket = submit(batcher, "in time")
    await answers([ticket])
    assert model.seen == ["in time"]


async def taking(batcher: Batcher, seconds: float) -> None:
    """Each phrase, as far as admission knows."""
    for _ in range(100):
        batcher.admission.observe(seconds, 1)


async def test_batcher_places_of_those_who_left_are_free_at_once(batcher_of: Make, model: Model) -> None:
    batcher = await batcher_of(limit=3)
    first = await occupied(batcher, model)
    for _ in range(20):
        tickets = [submit(batcher, f"{i}") for i in range(3)]
        for ticket in tickets:
            ticket.future.cancel()
        await asyncio.sleep(0)
        assert batcher.waiting == 0
    last = [submit(batcher, f"{i}") for i in range(3)]
    model.open.set()
    await answers([first, *last])
    assert model.seen == ["first", "0", "1", "2"]


async def test_batcher_measures_what_a_phrase_takes(batcher_of: Make) -> None:
    def encode(phrases: Sequence[str], tokens: bool) -> list[Encoding]:
        time.sleep(0.02)
        return [Encoding(np.zeros(2, np.float32)) for _ in phrases]

    batcher = Batcher(encode, workers=1, limit=100)
    await answers([submit(batcher, f"{i}") for i in range(30)])
    assert batcher.admission.service_s >= 0.019
    assert batcher.admission.p95_s >= 0.02
    await batcher.close()


# --- threads that do not come back, loops that end ---


async def test_batcher_a_stuck_thread_is_replaced_and_its_waiters_hear_of_it(
    batcher_of: Make, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "nlu.batcher")
    batcher = await batcher_of()
    stuck = await occupied(batcher, model, "stuck")
    waiting = submit(batcher, "waiting")
    batcher.look(STUCK_S - 0.1)
    assert (batcher.replaced, batcher.fruitless) == (0, 0)  # the control: it may only be slow
    batcher.look(0.2)
    assert kinds(await answers([stuck])) == [Stuck]
    assert (batcher.replaced, batcher.fruitless) == (1, 1)
    model.open.set()
    assert kinds(await answers([waiting])) == [Encoding]
    assert batcher.fruitless == 0


async def test_batcher_batchmates_of_a_stuck_phrase_are_not_run_again(
    batcher_of: Make, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "nlu.batcher")
    batcher = await batcher_of(max_batch=3)
    model.hold()
    tickets = [submit(batcher, phrase) for phrase in ("a", "b", "c")]
    await asyncio.to_thread(model.busy.wait, 20)
    batcher.look(STUCK_S + 0.1)
    assert kinds(await answers(tickets)) == [Stuck] * 3
    assert model.batches == [["a", "b", "c"]]


async def test_batcher_what_a_given_up_thread_brings_back_later_goes_to_nobody(
    batcher_of: Make, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "nlu.batcher")
    batcher = await batcher_of()
    stuck = await occupied(batcher, model, "stuck")
    batcher.look(STUCK_S + 0.1)
    await answers([stuck])
    model.open.set()
    found = await answers([submit(batcher, "x" * length) for length in range(1, 20)])
    assert [answer.sentence[0] for answer in found if isinstance(answer, Encoding)] == list(range(1, 20))


async def test_batcher_counts_replacements_that_help_nothing(
    batcher_of: Make, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "nlu.batcher")
    batcher = await batcher_of(workers=2)
    model.hold()
    for times in range(1, 4):
        tickets = [submit(batcher, phrase) for phrase in ("a", "b")]
        while batcher.waiting:
            await asyncio.sleep(0)
        batcher.look(STUCK_S + 0.1)
        assert kinds(await answers(tickets)) == [Stuck] * 2
        assert (batcher.fruitless, batcher.replaced) == (times, 2 * times)


async def test_batcher_an_idle_thread_is_not_stuck(batcher_of: Make) -> None:
    batcher = await batcher_of()
    for _ in range(10):
        batcher.look(STUCK_S)
    await answers([submit(batcher, "a")])
    batcher.look(STUCK_S)
    assert batcher.replaced == 0


async def test_batcher_each_run_has_its_own_time(batcher_of: Make, model: Model) -> None:
    batcher = await batcher_of()
    for _ in range(3):
        ticket = await occupied(batcher, model)
        batcher.look(STUCK_S - 0.1)
        model.open.set()
        assert kinds(await answers([ticket])) == [Encoding]
    assert batcher.replaced == 0


async def test_batcher_a_loop_that_ended_is_started_again(
    batcher_of: Make, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "nlu.batcher")
    batcher = await batcher_of()
    first = await occupied(batcher, model)
    waiting = submit(batcher, "waiting")
    batcher._loops[0].cancel()
    assert kinds(await answers([first])) == [Draining]
    model.open.set()
    await asyncio.sleep(0.05)
    assert not waiting.future.done()  # the control: nobody is there
    batcher.look(0.05)
    assert kinds(await answers([waiting])) == [Encoding]
    assert batcher.replaced == 1


async def test_batcher_a_loop_that_raises_answers_its_waiters(
    batcher_of: Make, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "nlu.batcher")
    batcher = await batcher_of()

    def broken(phrases: int) -> None:
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr(batcher, "_measure", broken)
    assert kinds(await answers([submit(batcher, "a")])) == [EncodeFailed]
    monkeypatch.undo()
    batcher.look(0.05)
    assert kinds(await answers([submit(batcher, "b")])) == [Encoding]


@pytest.mark.parametrize("error", [SystemExit(), KeyboardInterrupt(), GeneratorExit()], ids=repr)
async def test_batcher_what_would_end_a_process_is_an_error_like_any_other(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "nlu.batcher")

    def encode(phrases: Sequence[str], tokens: bool) -> list[Encoding]:
        raise error

    batcher = Batcher(encode, workers=1, limit=9)
    assert kinds(await answers([submit(batcher, "a"), submit(batcher, "b")])) == [EncodeFailed] * 2
    await batcher.close()


@pytest.mark.parametrize("error", [Overloaded, TooLate, Draining, EncodeFailed, Stuck])
def test_batcher_errors_are_of_one_tree(error: type[Exception]) -> None:
    assert issubclass(error, NluError)
