"""What long work shows on stderr while it runs: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from nlu.training.config import Config
    from nlu.training.train import Watch

err = Console(stderr=True, highlight=False)


class Bar:
    """A progress bar on stderr, as a context."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=err,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, what: str, done: int, total: int) -> None:
        """Report progress of one named piece of work."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)

    def __call__(self, items: Any, total: int, what: str) -> Any:
        for done, item in enumerate(items, 1):
            self.step(what, done, total)
            yield item


class Steps:
    """Training on stderr, as a context: a bar with the speed, and loss and effective negatives of each task.

    Where stderr is no terminal, a line every `every` steps.
    """

    def __init__(self, total: int, *, every: int) -> None:
        self._every = every
        self._recent: deque[tuple[int, float]] = deque(maxlen=50)  # phrases and seconds of the last steps
        self._tasks: dict[str, tuple[float, float | None]] = {}
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._bar = self._progress.add_task("", total=total)
        self._total = total
        self._live = Live(console=err, get_renderable=self._page, refresh_per_second=4, transient=True)

    def __enter__(self) -> Steps:
        if err.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def step(self, step: int, what: Any) -> None:
        """Report a step; checkpoints are not shown."""
        if not hasattr(what, "loss"):
            return
        before, _ = self._tasks.get(what.task, (what.loss, None))
        self._tasks[what.task] = (0.9 * before + 0.1 * what.loss, what.negatives)
        self._recent.append((what.phrases, what.seconds))
        self._progress.update(self._bar, completed=step, description=self._speed())
        if not err.is_terminal and (step % self._every == 0 or step == self._total):
            losses = ", ".join(f"{task} {self._seen(task)}" for task in self._tasks)
            err.print(Text(f"step {step}/{self._total}: {losses}; {self._speed()}"), soft_wrap=True)

    def _speed(self) -> str:
        phrases, seconds = map(sum, zip(*self._recent, strict=True))
        return f"{phrases / max(seconds, 1e-9):,.0f} phrases/s"

    def _seen(self, task: str) -> str:
        loss, negatives = self._tasks[task]
        return f"{loss:.3f}" + ("" if negatives is None else f" ({negatives:.0f} negatives)")

    def _page(self) -> Any:
        table = Table.grid(padding=(0, 2))
        for task in self._tasks:
            table.add_row(Text(task, style="dim"), self._seen(task))
        return Group(self._progress, table)


class Stages:
    """Training in stages on stderr, as a context: a teacher's vectors, if there is one, then a `Steps` for each stage."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._vectors: Bar | None = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def encoded(self, done: int, total: int) -> None:
        """Report phrases that the teacher has encoded."""
        if self._vectors is None:
            self._vectors = self._open.enter_context(Bar())
        self._vectors.step("the teacher's vectors", done, total)

    def begun(self, stage: str, config: Config) -> Watch:
        """Report a stage, and what watches its steps."""
        self._open.close()
        err.print(Text(f"{stage}, {config.schedule.steps} steps"))
        bar = self._open.enter_context(Steps(config.schedule.steps, every=config.schedule.log_every))
        return bar.step
