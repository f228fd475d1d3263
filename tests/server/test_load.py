"""Many clients at once, some of them leaving and some wrong: nothing is lost, nothing stays, both sides agree.

The same driver runs long, on a server process, as `python -m benchmarks.soak`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

import psutil
import pytest
from benchmarks.soak import Case, Load, disagreements, make_cases, settled
from tests.server.conftest import Running, running
from tests.server.tools import until

from isologit import LLM
from isologit.engine.async_engine import AsyncEngine, Delta, Stream
from isologit.server.options import ServerOptions
from isologit.workload import demo_model_path


@pytest.fixture(scope="module")
def cases() -> Sequence[Case]:
    llm = LLM(demo_model_path(), num_threads=1)
    try:
        return make_cases(llm, 60, max_tokens=40)
    finally:
        llm.close()


async def drive(
    server: Running, cases: Sequence[Case], burst: int, rate: float, seconds: float, seed: int
) -> list[str]:
    """Problems, after a burst and a steady stream."""
    async with Load(server.url, cases, seed=seed + 1) as warm:
        await warm.burst(20)
    before = await settled(server.url)
    async with Load(server.url, cases, seed=seed) as load:
        await load.burst(burst)
        await load.steady(rate, seconds)
    after = await settled(server.url)
    assert load.counts["leaving"] > 5
    assert load.counts["bad"] > 5
    assert load.counts["answered"] > 100 or load.problems
    return disagreements(load, before, after)


def open_files() -> int:
    return psutil.Process(os.getpid()).num_fds()


def test_nothing_is_lost_and_nothing_leaks(cases: Sequence[Case]) -> None:
    with running(ServerOptions()) as server:
        files = open_files()
        assert asyncio.run(drive(server, cases, 300, 40.0, 5.0, seed=0)) == []
        server.wait_idle()
        state = server.uvicorn.server_state
        until(lambda: not state.connections and not state.tasks)
        assert open_files() <= files
        engine = server.service.engine
        assert not engine._streams
        assert engine.num_waiting == 0
        assert not engine.engine._live._progress
        assert not engine.engine.runner._tables


@pytest.mark.parametrize("what", ["an answer", "a token", "a count"])
def test_what_is_lost_is_found(
    start: Callable[..., Running], cases: Sequence[Case], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Inverse: the check fails when something is lost. More than once, as nobody misses what a leaving client loses."""
    server = start()
    seen = 0
    if what == "an answer":
        take = Stream.take

        async def losing(stream: Stream) -> object:
            nonlocal seen
            seen += 1
            return [] if 1000 <= seen < 1010 else await take(stream)

        monkeypatch.setattr(Stream, "take", losing)
    elif what == "a token":
        deliver = AsyncEngine._deliver

        def losing_some(engine: AsyncEngine, deltas: list[tuple[str, Delta]]) -> None:
            nonlocal seen
            going_on = [i for i, (_, delta) in enumerate(deltas) if delta.output is None]
            lost = None
            if len(going_on) > 50:  # in the burst, of another request each time
                seen += 1
                lost = going_on[seen % len(going_on)]
            deliver(engine, [delta for i, delta in enumerate(deltas) if i != lost])

        monkeypatch.setattr(AsyncEngine, "_deliver", losing_some)
    else:
        miscounting = server.service.metrics.watch

        def watch(count: int) -> object:
            nonlocal seen
            seen += 1
            return miscounting(count + (seen == 100))

        monkeypatch.setattr(server.service.metrics, "watch", watch)
    assert asyncio.run(drive(server, cases, 150, 30.0, 1.0, seed=1)) != []
