"""nlu.batcher: bounded, in order, nothing computed in vain, and an answer for every waiter whatever the model does."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

import numpy as np
import pytest

from annotators.annotator import Encoding
from nlu.batcher import Batcher, Ticket
from nlu.errors import Draining, EncodeFailed, NluError, Overloaded, TooLate

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

    async def make(**options: int) -> Batcher:
        made.append(Batcher(model, **({"workers": 1, "limit": 100} | options)))
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
    return batcher.submit(phrase, tokens=tokens, deadline=deadline)


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
    with pytest.raises(Overloaded, match="3 phrases are waiting already"):
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
    assert refused.value.retry_after_ms == pause
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


@pytest.mark.parametrize("error", [Overloaded, TooLate, Draining, EncodeFailed])
def test_batcher_errors_are_of_one_tree(error: type[Exception]) -> None:
    assert issubclass(error, NluError)
