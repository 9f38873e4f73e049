"""A search as it is seen: a bar on a terminal, one plain line a trial elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dashboards import quantities
from search_space.layout import Layout
from storage.records import ResultRecord, TrialRecord

SPARKS = "▁▂▃▄▅▆▇█"


class ProgressWatcher:
    """Shows a search on standard error; implements nas.watcher.Watcher."""

    def __init__(self, console: Console, *, total: int, done: int, repeats: int = 0) -> None:
        self.console, self.total = console, total
        self.repeats, self.repeated_now = repeats, 0
        """Trainings with new seeds that are to come when all trials are there, and how many came."""
        self.done = self.before = done
        self.over: set[int] = set()
        self.again: set[int] = set()
        """Those that rested before, and are counted already."""
        self.resting: set[int] = set()
        self.running = 0
        self.skips = 0
        self.volumes: list[float] = []
        self.best: TrialRecord | None = None
        self.began = time.monotonic()
        self.progress: Progress | None = None
        self.task: Any = None

    def __enter__(self) -> "ProgressWatcher":
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn(" "),
                BarColumn(bar_width=36),
                TextColumn("{task.completed}/{task.total}  {task.fields[state]}"),
                console=self.console,
                refresh_per_second=4,
                transient=True,
            )
            self.progress.start()
            self.task = self.progress.add_task(
                "trials", total=self.total, completed=self.done, state="starting"
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def started(self, trial: TrialRecord) -> None:
        """One more is running."""
        self.running += 1
        self.resting.discard(trial.number)
        if trial.results:
            self.again.add(trial.number)
        self._show()
        if self.progress is None and self.done == self.before and self.running == 1:
            self._line(f"first trial running: {trial.layout.text}")

    def ended(
        self, trial: TrialRecord, *, hypervolume: float, best: TrialRecord | None, reused: bool
    ) -> None:
        """One trial less to come."""
        # One that rests at a rung may go on later, and end once more.
        if trial.number not in self.again:
            self.over.add(trial.number)
        self.done = self.before + len(self.over)
        if trial.state == "pruned":
            self.resting.add(trial.number)
        self.running = max(0, self.running - (0 if reused else 1))
        self.volumes.append(hypervolume)
        self.best = best
        self._show()
        result = trial.result
        ending = f"{trial.state}: {trial.why}"
        if result is not None and trial.state in ("done", "pruned"):
            ending = f"quality {result.quality:.3f}" + (
                f" at rung {result.rung + 1}, rests" if trial.state == "pruned" else ""
            )
        known = ", known already" if reused else ""
        if self.progress is None:
            self._line(
                f"[{self.done}/{self.total}] trial {trial.number} {trial.layout.text} ({trial.origin}): "
                f"{ending}{known}; hypervolume {hypervolume:.3f}, {self._left()}"
            )
        elif trial.state not in ("done", "pruned"):
            self._line(f"trial {trial.number} {trial.layout.text}: {ending}")

    def followed(self, trial: TrialRecord, *, hypervolume: float) -> None:
        """One trial less to come, by another driver."""
        if trial.number not in self.again:
            self.over.add(trial.number)
        self.done = self.before + len(self.over)
        self.volumes.append(hypervolume)
        self._show()
        if self.progress is None:
            self._line(
                f"[{self.done}/{self.total}] trial {trial.number} {trial.layout.text}: {trial.state} elsewhere; "
                f"hypervolume {hypervolume:.3f}"
            )

    def repeated(self, trial: TrialRecord, result: ResultRecord) -> None:
        """One more seed."""
        self.repeated_now += 1
        seeds = trial.by_seed("quality")
        self._line(
            f"seed {result.seed} of trial {trial.number} {trial.layout.text}: quality {result.quality:.3f}, "
            f"{sum(seeds) / len(seeds):.3f} over {len(seeds)} seeds"
        )

    def skipped(self, layout: Layout, why: str) -> None:
        """A proposal was turned down."""
        del layout, why
        self.skips += 1
        self._show()

    def stopping(self, running: int) -> None:
        """The first Ctrl-C."""
        self._line(
            f"stopping: {running} running trial{'s' if running != 1 else ''} will finish; Ctrl-C again stops at once"
        )

    def note(self, text: str) -> None:
        """A line of its own."""
        if self.progress is not None and text.startswith("measuring"):
            self.progress.update(self.task, state=text)
        else:
            self._line(text)

    def tick(self, running: int) -> None:
        """Nothing ended for a while."""
        self.running = running
        self._show()

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _left(self) -> str:
        ended = self.done - self.before + self.repeated_now
        if not ended:
            return "time left unknown"
        coming = max(0, self.total - self.done) + max(0, self.repeats - self.repeated_now)
        return f"{quantities.duration((time.monotonic() - self.began) / ended * coming)} left"

    def _show(self) -> None:
        if self.progress is None:
            return
        parts = [f"{self.running} running", self._left()]
        if self.volumes:
            parts.append(f"hypervolume {self.volumes[-1]:.3f} {spark(self.volumes)}")
        if self.resting:
            parts.append(f"{len(self.resting)} stopped early")
        if self.skips:
            parts.append(f"skipped {self.skips}")
        if self.best is not None and self.best.result is not None:
            parts.append(f"best {self.best.value('quality'):.3f} {self.best.layout.text}")
        self.progress.update(self.task, completed=self.done, state=" · ".join(parts))


def spark(values: list[float], points: int = 8) -> str:
    """A few bars that show how a number rose."""
    picked = [values[index * len(values) // points] for index in range(min(points, len(values)))][
        :-1
    ] + values[-1:]
    low, high = min(picked), max(picked)
    return "".join(SPARKS[round((value - low) / ((high - low) or 1) * (len(SPARKS) - 1))] for value in picked)
