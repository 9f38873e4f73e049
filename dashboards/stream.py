"""Events of a study as they happen: a stream that a browser resumes by number, or one answer at a time."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Header, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse
from starlette.types import Message, Send

from dashboards.api import REFUSALS, Segment
from dashboards.desk import Desk
from storage.records import EventRecord
from storage.store import Store

POLL_S = 0.7
STREAM_S = 60.0
"""A stream ends after this long and the browser resumes it, so that none outlives its reader for ever."""
STREAMS = 32
STALLED_S = 20.0
"""A reader that takes nothing for so long has gone, whatever its connection says, and leaves its place to another."""
BATCH = 200


@dataclass(frozen=True, kw_only=True)
class EventsAnswer:
    """Events in order; ask again with `after` set to `last`."""

    last: int
    events: list[EventRecord]


class Stream(StreamingResponse):
    """A stream that is given up once its reader stalls."""

    async def stream_response(self, send: Send) -> None:
        """As of its class, where every part is taken in time."""

        async def hurried(message: Message) -> None:
            async with asyncio.timeout(STALLED_S):
                await send(message)

        try:
            await super().stream_response(hurried)
        except TimeoutError:
            # What waits to be sent is one part; the connection dies with the reader or with the server.
            return
        finally:
            if isinstance(self.body_iterator, AsyncGenerator):
                await self.body_iterator.aclose()


def router(desk: Desk, closing: threading.Event) -> APIRouter:
    """The route of events of one database; streams end once `closing` is set."""
    routes = APIRouter(prefix="/api/v1", tags=["events"], responses=REFUSALS)
    places = asyncio.Semaphore(STREAMS)

    def read(segment: str, start: int | None) -> EventsAnswer:
        with desk.study(segment) as (store, study):
            if start is None:
                return EventsAnswer(last=latest_event(store), events=[])
            found = store.events(study=study, after=start, limit=BATCH)
            return EventsAnswer(last=found[-1].seq if found else start, events=found)

    async def stream(segment: str, start: int | None, known: EventsAnswer) -> AsyncGenerator[str, None]:
        # The database is open within read() alone. A reader that stalls holds this coroutine at its yield,
        # one batch of events, and nothing else.
        async with places:
            until = time.monotonic() + STREAM_S
            # Not the last of the first batch: whoever is cut before its events would never ask for them again.
            yield f"retry: 1000\nid: {known.last if start is None else start}\n\n"
            while time.monotonic() < until and not closing.is_set():
                for event in known.events:
                    yield _sent(event)
                if len(known.events) < BATCH:
                    yield ": still here\n\n"
                    await asyncio.sleep(POLL_S)
                known = await run_in_threadpool(read, segment, known.last)

    @routes.get("/studies/{segment}/events", response_model=EventsAnswer)
    async def events(
        request: Request,
        segment: Segment,
        after: Annotated[int | None, Query(ge=0, le=2**62)] = None,
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> EventsAnswer | Response:
        """What happened after an event: a stream where text/event-stream is asked for, else one answer."""
        resumed = last_event_id is not None and last_event_id.isascii() and last_event_id.isdigit()
        start = min(int(last_event_id[:19]), 2**62) if resumed and last_event_id else after
        if "text/event-stream" not in request.headers.get("accept", ""):
            return await run_in_threadpool(read, segment, start or 0)
        if places.locked():
            raise HTTPException(503, f"{STREAMS} pages follow this dashboard already", {"Retry-After": "5"})
        known = await run_in_threadpool(read, segment, start)
        return Stream(stream(segment, start, known), media_type="text/event-stream")

    return routes


def latest_event(store: Store) -> int:
    """The number of the newest event, found in a few dozen short reads however many there are."""
    low, step = 0, 1
    while store.events(after=low + step, limit=1):
        low, step = low + step, step * 2
    while step > 1:
        step //= 2
        if store.events(after=low + step, limit=1):
            low += step
    rest = store.events(after=low, limit=2)
    return rest[-1].seq if rest else low


def _sent(event: EventRecord) -> str:
    data = json.dumps({"at": event.at, "kind": event.kind, "payload": dict(event.payload)})
    return f"id: {event.seq}\nevent: change\ndata: {data}\n\n"
