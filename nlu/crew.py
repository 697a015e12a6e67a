"""Several worker processes on one port, which serve the same release at any moment.

The supervisor never loads a model. It starts the workers, replaces those that die, and swaps releases in two phases:
every worker loads the new one beside what it serves, and only when all of them can, all change at one moment of the
monotonic clock, which the processes of a machine share. What happens when a worker dies meanwhile is told in
docs/processes.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector
from pydantic import SecretStr

from nlu import guard, metrics, scrapes
from nlu.errors import NluError, WorkerFailed
from nlu.gathered import Gathered
from nlu.lines import Body, Lines, bundle_out, error_in, release_out
from nlu.settings import Settings
from nlu.steward import keep
from nlu.types import Release
from statics.bundle import Bundle
from statics.errors import StaticsError

logger = logging.getLogger(__name__)

_SUPERVISOR = "supervisor"
_OURS = (
    "nlu_release_",
    "nlu_bundle_",
    "nlu_swap",
    "nlu_channel_",
    "nlu_memory_",
    "nlu_worker",
    "nlu_control_",
)
_PROC = Path("/proc")
_SCRAPE_S = 5.0  # of a worker that is slower, a scrape has what it said before
_EXIT_S = 10.0  # from a worker's last word to the end of its process


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a supervisor waits, in seconds."""

    start: float = 60.0  # for a new worker's first word
    load: float = 600.0  # for one worker to load a bundle
    answer: float = 20.0  # for anything small; a worker that is silent so long is killed
    beat: float = 5.0  # between two questions whether a worker is there
    ahead: float = 0.05  # from the order to flip to the flip
    follow: float = 1.0  # a worker that serves the old release so long after a flip is killed
    pause: float = 1.0  # before a dead worker is replaced; doubled from death to death
    longest_pause: float = 30.0
    steady: float = 60.0  # a worker that lived so long was no failed attempt


async def supervise(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Raises StaticsError or EngineRefused where what was named is not fit to serve."""
    guard.arm()
    await keep(settings, Workers(settings))


class Hand:
    """One worker process, as the supervisor sees it."""

    def __init__(self, number: int, process: Process, lines: Lines) -> None:
        self.number, self.pid = number, process.pid
        self.alive = True  # until its end of the line is closed
        self.prepared = ""  # digest of what it loaded beside what it serves
        self.since = time.monotonic()
        self.farewell = ""  # its last exposition, where it ended of its own will
        self._process, self._lines = process, lines
        self._answers: dict[int, asyncio.Future[Body]] = {}
        self._asked = 0
        self._reading = asyncio.create_task(self._read(), name=f"worker-{number}")

    async def ask(self, what: str, within_s: float, **body: object) -> Body:
        """Its answer, or the refusal it raised. Raises WorkerFailed where it ends, keeps silent or fails."""
        if not self.alive:
            raise self._ended(what)
        self._asked += 1
        number, answer = self._asked, asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        self._lines.send({"id": number, "what": what, **body})
        try:
            return await asyncio.wait_for(answer, within_s)
        except TimeoutError as error:
            raise WorkerFailed(f"worker {self.number} did not answer {what!r} in {within_s:.1f} s") from error
        finally:
            del self._answers[number]

    async def ended(self) -> str:
        """Waits for its end, and says how it ended."""
        await asyncio.wait([self._reading])
        status = await self._process.wait()
        return (
            f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        )

    def kill(self) -> None:
        """At once, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _read(self) -> None:
        """Until the other end is gone. A worker that talks nonsense is no worker."""
        try:
            while (message := await self._lines.receive()) is not None:
                self._take(message)
        except (ValueError, KeyError, TypeError) as error:
            logger.error("worker %d sent what is no answer: %s", self.number, error)
            self.kill()
        self.alive = False
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(self._ended("anything"))
        self._lines.close()
        try:
            await asyncio.wait_for(self._process.wait(), _EXIT_S)
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def _take(self, message: Body) -> None:
        if "farewell" in message:
            self.farewell = str(message["farewell"])
            return
        answer = self._answers.get(message["id"])
        if answer is None or answer.done():
            return  # too late: nobody waits any more
        if "error" in message:
            answer.set_exception(error_in(message["error"], worker=self.number))
        else:
            answer.set_result(message["answer"])

    def _ended(self, what: str) -> WorkerFailed:
        return WorkerFailed(f"worker {self.number} ended before it answered {what!r}; the log says how")


class Workers:
    """The Crew of several processes. All its methods are for the event loop's thread, which must be the main one."""

    def __init__(self, settings: Settings, *, patience: Patience | None = None) -> None:
        self._settings, self._patience = settings, patience or Patience()
        self._hands: dict[int, Hand] = {}  # those that listen
        self._keepers: list[asyncio.Task[None]] = []
        self._held: list[socket.socket] = []
        self._serving: Bundle | None = None
        self._prepared: Bundle | None = None
        self._release = Release()
        self._door = asyncio.Lock()  # held while a worker begins to listen, and while all flip
        self._gathered = Gathered()
        self._close_metrics: Callable[[], None] | None = None

    @property
    def size(self) -> int:
        """How many there are when all are well."""
        return self._settings.processes

    @property
    def pids(self) -> dict[int, int]:
        """The processes that listen now, by worker."""
        return {number: hand.pid for number, hand in self._hands.items()}

    def rss_bytes(self) -> int:
        """Memory of all workers; a page they share counts once."""
        return sum(pss_bytes(hand.pid) for hand in self._hands.values())

    async def start(self) -> int:
        """All workers listen; the port. Raises OSError for a port that is taken, WorkerFailed where one cannot start."""
        self._settings = self._reserved(self._settings)
        hands = [await self._spawn(number) for number in range(1, self.size + 1)]
        try:
            await _all(self._join(hand) for hand in hands)
        except BaseException:
            for hand in hands:
                hand.kill()
            await asyncio.gather(*(hand.ended() for hand in hands))
            raise
        self._keepers = [
            asyncio.create_task(self._keep(hand), name=f"keeper-{hand.number}") for hand in hands
        ]
        self._keepers.append(asyncio.create_task(self._beat(), name="beat"))
        metrics.WORKERS.set_function(lambda: len(self._hands))
        if self._settings.metrics:
            self._close_metrics = self._serve_metrics()
        return self._settings.port

    async def prepare(self, bundle: Bundle) -> None:
        """Where something is served, one worker after another: a load takes a core and some memory for a moment, and
        the first to refuse spares the others the work. At a cold start nobody waits for an answer, so all at once."""
        self._prepared = bundle
        hands = list(self._hands.values())
        if not hands:
            raise WorkerFailed(f"found no worker alive, expected {self.size}; see the log for why they end")
        try:
            if self._serving is None:
                await _all(self._load(hand, bundle) for hand in hands)
            else:
                for hand in hands:
                    await self._load(hand, bundle)
            for hand in hands:
                await hand.ask("hello", self._patience.answer)  # one may have died since, of this very bundle
        except BaseException:
            await self.abandon()
            raise

    async def flip(self) -> None:
        """From the moment of the order on, what was prepared is what serves, and a worker that does not follow is killed.

        Before it any failure leaves what served before; a worker that died since it prepared needs no order, as the
        one in its place loads what serves then.
        """
        async with self._door:
            bundle = self._prepared
            if bundle is None:
                raise WorkerFailed("found nothing prepared, expected a bundle; prepare first")
            for hand in list(self._hands.values()):  # those that came since
                if hand.prepared != bundle.digest:
                    await self._load(hand, bundle)
            hands = list(self._hands.values())
            if not hands:
                raise WorkerFailed(
                    f"found no worker alive, expected {self.size}; see the log for why they end"
                )
            self._serving, self._prepared = bundle, None
            at = time.monotonic() + self._patience.ahead
            freed = [asyncio.create_task(self._flip(hand, at)) for hand in hands]
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            await asyncio.gather(*(self._follows(hand, bundle.digest) for hand in hands))
        await asyncio.gather(*freed)

    async def abandon(self) -> None:
        """Every worker drops what it prepared."""
        self._prepared = None
        await self._ask_all("abandon")
        for hand in self._hands.values():
            hand.prepared = ""

    async def tell(self, release: Release) -> None:
        """What Describe says from now on, also in workers to come."""
        self._release = release
        await self._ask_all("tell", release=release_out(release))

    async def drain(self) -> None:
        """All at once; a second SIGTERM or SIGINT meanwhile ends those that are not done."""
        hands = list(self._hands.values())
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, _kill_all, hands)
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(self._dismiss(hand) for hand in hands))
        self._hands.clear()
        if self._close_metrics is not None:
            await asyncio.to_thread(self._close_metrics)
        for held in self._held:
            held.close()

    async def _spawn(self, number: int) -> Hand:
        """A fresh interpreter, by exec: a fork of this process would inherit gRPC's locks without its threads."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "nlu.worker", str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                env={**_foreign(os.environ), **environment(of_worker(self._settings, number))},
                stdin=DEVNULL,
            )
        return Hand(number, process, await Lines.over(ours))

    async def _join(self, hand: Hand) -> None:
        """A new worker loads what serves, then listens: it never answers with anything else."""
        await hand.ask("hello", self._patience.start)
        while True:
            serving = self._serving
            if serving is not None:
                await self._load(hand, serving, whole=True)
                await self._flip(hand, time.monotonic())
            async with self._door:
                if self._serving is not serving:
                    continue  # a flip came between
                await hand.ask("tell", self._patience.answer, release=release_out(self._release))
                await hand.ask("listen", self._patience.answer)
                self._hands[hand.number] = hand
                hand.since = time.monotonic()
                return

    async def _keep(self, hand: Hand) -> None:
        """Replaces a worker whenever it ends."""
        pause_s = self._patience.pause
        while True:
            number, how = hand.number, await hand.ended()
            self._hands.pop(number, None)
            if hand.farewell:
                self._gathered.heard(str(number), hand.farewell, without=_OURS)
            self._gathered.gone(str(number))
            if time.monotonic() - hand.since >= self._patience.steady:
                pause_s = self._patience.pause
            logger.warning("worker %d (process %d) %s; another will take its place", number, hand.pid, how)
            another: Hand | None = None
            while another is None:
                await asyncio.sleep(pause_s * random.uniform(1.0, 1.25))
                pause_s = min(2 * pause_s, self._patience.longest_pause)
                metrics.WORKER_RESTARTS.inc()
                another = await self._replacement(number)
            hand = another

    async def _replacement(self, number: int) -> Hand | None:
        """Another worker in the place of one; None where it cannot serve."""
        try:
            hand = await self._spawn(number)
        except OSError as error:
            logger.error("worker %d cannot be started: %s", number, error)
            return None
        try:
            await self._join(hand)
        except BaseException as error:
            hand.kill()
            await hand.ended()
            if not isinstance(error, NluError | StaticsError):
                raise
            logger.error("worker %d cannot serve: %s", number, error)
            return None
        logger.info("worker %d serves again, as process %d", number, hand.pid)
        return hand

    async def _beat(self) -> None:
        """A worker whose loop stands still cannot be drained, and a probe finds it only by chance."""
        while True:
            await asyncio.sleep(self._patience.beat)
            await self._ask_all("hello")

    async def _load(self, hand: Hand, bundle: Bundle, *, whole: bool = False) -> None:
        await hand.ask("prepare", self._patience.load, bundle=bundle_out(bundle), whole=whole)
        hand.prepared = bundle.digest

    async def _flip(self, hand: Hand, at: float) -> None:
        """Until what served before is freed. One that cannot is killed: it would serve a release of its own."""
        within_s = self._settings.max_deadline_s + self._patience.answer
        hand.prepared = ""
        try:
            await hand.ask("flip", within_s, at_us=round(at * 1e6))
        except (NluError, StaticsError) as error:
            if hand.alive:
                logger.error("worker %d cannot flip: %s; killing it", hand.number, error)
                hand.kill()

    async def _follows(self, hand: Hand, digest: str) -> None:
        """One that is seen with the old release after that time is killed; it may be stopped, or stuck."""
        until = time.monotonic() + self._patience.follow
        try:
            while (await hand.ask("serving", max(0.0, until - time.monotonic())))["digest"] != digest:
                await asyncio.sleep(0.01)
        except WorkerFailed as error:
            if hand.alive:
                logger.error("%s after a flip; killing it", error)
                hand.kill()

    async def _ask_all(self, what: str, **body: object) -> None:
        """Something small of everybody; a worker that does not do it is killed, and another takes its place."""

        async def ask(hand: Hand) -> None:
            try:
                await hand.ask(what, self._patience.answer, **body)
            except (NluError, StaticsError) as error:
                if hand.alive:
                    logger.error("%s; killing it", error)
                    hand.kill()

        await asyncio.gather(*(ask(hand) for hand in list(self._hands.values())))

    async def _dismiss(self, hand: Hand) -> None:
        """Until it ended; it may have done so on its own, as whole groups of processes are told to stop."""
        with contextlib.suppress(WorkerFailed):
            await hand.ask("drain", self._patience.answer)
        try:
            await asyncio.wait_for(hand.ended(), self._settings.drain_s + self._patience.answer)
        except TimeoutError:
            logger.error("worker %d did not drain in %.0f s; killing it", hand.number, self._settings.drain_s)
            hand.kill()
            await hand.ended()

    def _reserved(self, settings: Settings) -> Settings:
        """With the ports that are ours from now on, also where any free one was asked for."""
        ports = {"port": settings.port, "http_port": settings.http_port}
        for name, port in ports.items():
            if port is not None:
                self._held.append(reserve(settings.host, port))
                ports[name] = self._held[-1].getsockname()[1]
        return settings.model_copy(update=ports)

    def _serve_metrics(self) -> Callable[[], None]:
        """Prometheus on its own port, and how to close it."""
        registry, loop = CollectorRegistry(), asyncio.get_running_loop()

        def ask() -> list[Metric]:
            return asyncio.run_coroutine_threadsafe(self.families(), loop).result(2 * _SCRAPE_S)

        registry.register(_Scrape(ask))
        return scrapes.listen(self._settings, registry)

    async def families(self) -> list[Metric]:
        """What the supervisor and all workers counted until now."""
        self._gathered.heard(
            _SUPERVISOR, generate_latest(metrics.REGISTRY).decode(), only=(*_OURS, "process_")
        )
        await asyncio.gather(*(self._hear(hand) for hand in list(self._hands.values())))
        return self._gathered.families()

    async def _hear(self, hand: Hand) -> None:
        with contextlib.suppress(WorkerFailed):
            said = await hand.ask("metrics", _SCRAPE_S)
            if self._hands.get(hand.number) is hand:  # else its counts are added to its successor's already
                self._gathered.heard(str(hand.number), said["text"], without=_OURS)


class _Scrape(Collector):
    """Asked by the listener's thread, answered on the loop's."""

    def __init__(self, ask: Callable[[], list[Metric]]) -> None:
        self._ask = ask

    def describe(self) -> list[Metric]:
        """Nothing: what there is, only the workers know."""
        return []

    def collect(self) -> list[Metric]:
        """The families of all processes, each once."""
        return self._ask()


def reserve(host: str, port: int) -> socket.socket:
    """Hold a port without listening, so that it stays ours while workers come and go; 0 takes any free one.

    Workers share it by SO_REUSEPORT, with which a second server of this user would share it too, and get some of the
    calls. So it is first bound without; and as SO_REUSEADDR, for the remains of old connections, would admit others
    beside a socket that does not listen, that is taken back once it has served. Raises OSError.
    """
    family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as alone:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            alone.bind(address)
        except OSError as error:
            raise OSError(
                error.errno,
                f"address: found {host}:{port} taken or not of this machine, expected a free one; use --host and "
                "--port, or stop the other server",
            ) from error
        address = alone.getsockname()
    held = socket.socket(family, kind)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(address)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return held


def of_worker(settings: Settings, number: int) -> Settings:
    """The supervisor keeps the doors that there is one of: metrics, control; and files that one process writes."""
    changed: dict[str, object] = {"metrics": False, "control": ""}
    sample = settings.shadow_sample
    if sample is not None:
        changed["shadow_sample"] = sample.with_name(f"{sample.stem}-{number}{sample.suffix}")
    return settings.model_copy(update=changed)


def environment(settings: Settings) -> dict[str, str]:
    """The NLU_* variables that give another process these settings; what nobody set stays unset."""
    found: dict[str, str] = {}
    for name in settings.model_fields_set:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        if value is not None:
            found[f"NLU_{name.upper()}"] = (
                json.dumps(value) if isinstance(value, tuple | bool) else str(value)
            )
    return found


def pss_bytes(pid: int) -> int:
    """Memory of a process, what it shares with others counted by its share; 0 where there is no such process."""
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _foreign(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if not name.upper().startswith("NLU_")}


def _kill_all(hands: Iterable[Hand]) -> None:
    logger.warning("told to stop again: ending what is still under way")
    for hand in hands:
        hand.kill()


async def _all(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All of them, or the first error, with none of the others left running."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
