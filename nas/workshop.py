"""What the dashboard asks of the floors that it may not see: prices of layouts, reasons, and what seeds say.

Prices and reasons need the mixers, and with them torch: they are worked out in a process of their own, which starts with
the first question, so that the server starts at once and no page waits for another one's answer.
"""

import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from typing import Any, TypeVar

from dashboards.desk import LayerPrice, Missing, NetworkPrice
from dashboards.reasons import Reasons
from dashboards.scene import Doubt
from search_space.frame import Frame
from storage.glances import Glance
from storage.records import Axis, ResultRecord, StudyRecord, TrialRecord

T = TypeVar("T")
EXPLAINED = 3000
"""Trials that reasons are worked out from: those of the front and the last ones, where a study has more."""
PATIENCE_S = 30.0
WATCH_S = 2.0
START_S = 20.0
"""How long the other process may take to start, where it is ended at once."""


class OwnProcess:
    """A Workshop whose slow work is done in one other process. Use it from several threads as you like."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._pid: Future[int] | None = None
        self._defaults: Mapping[str, Any] | None = None
        self._reasons: dict[tuple[str, float], tuple[int, Future[Reasons | None]]] = {}

    def close(self) -> None:
        """Ends the other process, whatever it is doing, and waits until it and the pool's threads are gone.

        Were the threads left to end by themselves, they could close their pipe while the interpreter, ending, writes
        to it.
        """
        self._end(self._pool)

    def _end(self, pool: ProcessPoolExecutor | None) -> None:
        """Ends one pool, unless somebody else did: the one that was started since is none of its business."""
        with self._lock:
            if pool is None or pool is not self._pool:
                return
            pid, self._pool = self._pid, None
        assert pid is not None, "asked when the pool was started"
        ended = True
        try:
            # What it is working out may take minutes, and nobody waits for it any more.
            os.kill(pid.result(START_S), signal.SIGTERM)
        except (BrokenProcessPool, ProcessLookupError):
            pass
        except TimeoutError:
            ended = False
        pool.shutdown(wait=ended, cancel_futures=True)

    def price(
        self,
        config: Mapping[str, Any],
        layout: str,
        points: Sequence[tuple[int, int]],
        *,
        width: int | None = None,
    ) -> list[NetworkPrice]:
        """As `Workshop.price`."""
        try:
            return self._ask(_priced, dict(config), layout, list(points), width)
        except TimeoutError:
            raise Missing("Pricing this layout takes too long here: use nas cost.") from None
        except ValueError as error:
            raise Missing(f"This layout cannot be priced: {error}") from None

    def defaults(self) -> Mapping[str, Any]:
        """As `Workshop.defaults`; asked of the other process once."""
        if self._defaults is None:
            try:
                self._defaults = self._ask(usual)
            except TimeoutError:
                raise Missing("The process that knows the defaults takes too long: ask again.") from None
        return self._defaults

    def _ask(self, call: Callable[..., T], *args: Any) -> T:
        """The other process's answer. TimeoutError where it takes too long; Missing where it died on the way."""
        workers = self._workers()
        try:
            return workers.submit(call, *args).result(PATIENCE_S)
        except (BrokenProcessPool, CancelledError):
            self._end(workers)
            raise Missing("The process that knows the mixers has died: ask again.") from None

    def reasons(self, study: StudyRecord, version: int) -> Reasons | str:
        """As `Workshop.reasons`; the last ones that are known while newer ones are worked out."""
        key = (study.name, study.created_at)
        with self._lock:
            known = self._reasons.get(key)
        if known is None or (known[1].done() and known[0] != version):
            workers = self._workers()
            try:
                asked = workers.submit(explained, self._url, study.name)
            except BrokenProcessPool:
                self._end(workers)
                return "The process that explains has died: it is started anew."
            with self._lock:
                self._reasons[key] = (version, asked)
            # While the newer ones are worked out, the older ones stand.
            if known is None or known[1].exception() is not None:
                return "The reasons are being worked out …"
            found = known[1].result()
        elif not known[1].done():
            return "The reasons are being worked out …"
        elif known[1].exception() is not None:
            return f"The reasons cannot be worked out: {known[1].exception()}"
        else:
            found = known[1].result()
        return "No trial was trained to the end yet." if found is None else found

    def doubt(self, axes: Sequence[Axis], seen: Sequence[Glance]) -> Doubt:
        """As `Workshop.doubt`."""
        return doubt(axes, seen)

    def _workers(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._pool is None:
                # Spawned, since the server has threads by then, and a fork of it would inherit their locks.
                pool = ProcessPoolExecutor(
                    1, mp_context=get_context("spawn"), initializer=_begin, initargs=(os.getpid(),)
                )
                self._pid = pool.submit(os.getpid)
                self._pool = pool
            return self._pool


def _begin(parent: int) -> None:
    """In the other process: Ctrl-C is the server's to answer, and nothing is worked out for a server that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def prices(
    config: dict[str, Any], layout: str, points: Sequence[tuple[int, int]], width: int | None
) -> list[NetworkPrice]:
    """A pattern of a study at each (context, batch), as `nas cost` has it. ValueError where it has no price."""
    from nas.config import of_study, resolve
    from nas.objectives import Quantity
    from nas.prices import cost_json
    from search_space.vocabulary import read
    from trainers.measure import frame_text

    target = resolve(of_study(config)).target
    frame = target.frame()
    frame = replace(frame, width=width or frame.width)
    pattern = read(layout)
    found = []
    for context, batch in points:
        # As objectives are taken at another context: the network stays the one that was searched.
        own = Quantity(base="latency_ms", context=context, batch=batch).frame(frame)
        told = cost_json(pattern, own, [context], target.fill)
        (cache,) = told["cache"]
        parts = cache["by_layer"]
        found.append(
            NetworkPrice(
                layout=told["layout"],
                context=context,
                batch=batch,
                params=told["params"],
                active_params=told["active_params"],
                stored_bytes=cache["stored_bytes"],
                read_bytes=cache["read_bytes"],
                flops_prefill=cache["flops_per_token"]["prefill"],
                flops_decode=cache["flops_per_token"]["decode"],
                by_layer=_gathered(
                    [str(layer) for layer in pattern.layers], parts, stacked=target.fill == "stack"
                ),
                command=_command(layout, own, target.fill),
                latency_frame=frame_text(own, "decode"),
            )
        )
    return found


def usual() -> dict[str, Any]:
    """The configuration of a search that was told nothing, as plain JSON."""
    from nas.config import Config

    return Config().model_dump(mode="json")


def _priced(
    config: dict[str, Any], layout: str, points: Sequence[tuple[int, int]], width: int | None
) -> list[NetworkPrice]:
    """As `prices`, with a refusal that can be sent to another process: some of them cannot be made anew there."""
    try:
        return prices(config, layout, points, width)
    except ValueError as error:
        raise ValueError(str(error)) from None


def _gathered(
    pattern: Sequence[str], parts: Sequence[Mapping[str, Any]], *, stacked: bool
) -> tuple[LayerPrice, ...]:
    """The network's layers gathered by the layer of the pattern that each of them is."""
    count = len(pattern)
    places = [
        index % count if stacked or len(parts) == count else index * count // len(parts)
        for index in range(len(parts))
    ]
    found = []
    for place, name in enumerate(pattern):
        own = [part for at, part in zip(places, parts, strict=True) if at == place]
        found.append(
            LayerPrice(
                layer=name,
                count=len(own),
                params=sum(part["params"] for part in own),
                stored_bytes=sum(part["stored_bytes"] for part in own),
                read_bytes=sum(part["read_bytes"] for part in own),
            )
        )
    return tuple(found)


def _command(layout: str, frame: Frame, fill: str) -> str:
    words = ["nas", "cost", layout, f"--width={frame.width}", f"--context={frame.context}"]
    words += [f"--batch={frame.batch}", f"--dtype={frame.dtype}", f"--vocabulary={frame.vocabulary}"]
    # What is so by default is not written.
    if frame.train_length != Frame(width=frame.width).train_length:
        words += [f"--train-length={frame.train_length}"]
    if frame.longest != max(frame.train_length, frame.context):
        words += [f"--longest={frame.longest}"]
    if frame.depth is not None:
        words += [f"--depth={frame.depth}", f"--fill={fill}"]
    return shlex.join(words)


def explained(url: str, name: str) -> Reasons | None:
    """The reasons of a study, from the trials of its front and its last ones."""
    from nas.explain.reasons import reasons
    from nas.front import front
    from storage.store import Store

    with Store.open(url, read_only=True) as store:
        study = store.study(name)
        if study is None:
            return None
        done = store.counts(study)["done"]
        trials = store.trials(study, states=["done"], offset=max(0, done - EXPLAINED), limit=EXPLAINED)
        if done > len(trials):
            known = {trial.number for trial in trials}
            best = front(store.trials(study, states=["done"]), study.axes)
            trials = [*(trial for trial in best if trial.number not in known), *trials]
    return reasons(study, trials)


def doubt(axes: Sequence[Axis], seen: Sequence[Glance]) -> Doubt:
    """Intervals and chances of layouts, from the seeds of all of them."""
    from nas.noise import chances, estimates, is_trained

    trials = [_whole(one) for one in seen]
    intervals = {
        axis.name: {
            number: (estimate.low, estimate.high) for number, estimate in estimates(trials, axis).items()
        }
        for axis in axes
        if is_trained(axis, trials)
    }
    return Doubt(
        chances=chances(trials, axes), intervals={name: own for name, own in intervals.items() if own}
    )


def _whole(seen: Glance) -> TrialRecord:
    """A glance as the record that the noise is worked out from: its numbers and nothing else."""

    def result(rung: int, quality: float, scores: Mapping[str, float]) -> ResultRecord:
        return ResultRecord(
            rung=rung,
            quality=quality,
            scores=scores,
            details={},
            steps=0,
            tokens=0,
            train_s=0.0,
            worker_s=0.0,
            seed=0,
        )

    rung, quality = seen.rungs[-1]
    return TrialRecord(
        number=seen.number,
        state=seen.state,
        origin=seen.origin,
        layout=seen.layout,
        params={},
        sampler_attrs={},
        costs=seen.costs,
        layer_costs=(),
        evaluation_key="",
        attempts=seen.attempts,
        why="",
        results=(result(rung, quality, seen.scores or {}),),
        repeats=tuple(result(rung, value, scores) for value, scores in seen.repeats),
    )
