"""A request whose logits are NaN ends with its error; the others do not notice."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from isologit import LLM, GenerationRequest, RequestOutput, SamplingParams
from isologit.engine.async_engine import AsyncEngine, EngineFailedError
from isologit.engine.blocks import BlockPool
from isologit.engine.request import Sequence
from isologit.engine.scheduler import Scheduler, SchedulerConfig
from isologit.workload import demo_model_path

POISON = 77  # a token after which everything a request computes is NaN


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """The demo model with NaN in one token's embedding."""
    folder = tmp_path_factory.mktemp("model") / "spoiled"
    shutil.copytree(demo_model_path(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    found = LLM(folder, num_threads=1, max_num_seqs=4)
    yield found
    found.close()


def requests(*, poisoned: bool, **params: Any) -> list[GenerationRequest]:
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, return_logits=True, **params)
    prompts = {str(i): [1, *range(10 + i, 40 + i)] for i in range(6)}
    if poisoned:
        prompts["bad"] = [1, *range(10, 40), POISON, 5]
    return [GenerationRequest(name, ids, sampling) for name, ids in prompts.items()]


def by_id(outputs: Iterator[RequestOutput]) -> dict[str, RequestOutput]:
    return {output.request_id: output for output in outputs}


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 1}, {"prompt_logprobs": 1}, {"logprobs": 2}])
def test_the_others_go_on_bit_for_bit(llm: LLM, params: dict[str, Any]) -> None:
    healthy = by_id(llm.run(requests(poisoned=False, **params)))
    found = by_id(llm.run(requests(poisoned=True, **params)))
    bad = found.pop("bad")
    assert bad.finish_reason == "error"
    assert bad.error is not None
    assert "NaN" in bad.error
    assert bad.token_ids == []
    assert set(found) == set(healthy)
    for name, output in found.items():
        assert output.error is None
        assert output.token_ids == healthy[name].token_ids
        assert np.array_equal(output.logits, healthy[name].logits)


def test_generate_returns_it_in_its_place(llm: LLM) -> None:
    prompts = [{"prompt_token_ids": [1, 10, 11]}, {"prompt_token_ids": [1, POISON]}, {"prompt_token_ids": [1, 12]}]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True))
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]


def test_its_blocks_come_back_and_are_not_handed_on(llm: LLM) -> None:
    loop = llm.open_loop()
    pool = loop.scheduler.blocks
    ids = [1, *range(10, 75), POISON, *range(80, 100)]
    loop.add(GenerationRequest("bad", ids, SamplingParams(max_tokens=4)))
    outputs: list[RequestOutput] = []
    while loop.has_work():
        outputs += loop.step()
    assert outputs[0].error is not None
    assert pool.num_free == pool.num_blocks
    assert pool.match_prefix(ids) == []
    loop.scheduler.check_integrity()
    loop.add(GenerationRequest("good", ids[:66], SamplingParams(max_tokens=4)))
    while loop.has_work():
        loop.step()
    assert pool.match_prefix(ids), "inverse: a healthy request's blocks are handed on"


def test_nan_after_a_wrong_draft_is_nobodys(llm: LLM) -> None:
    """A row that verification throws away may hold anything; a replay whose row is kept may not."""

    class Fixed:
        def is_worthwhile(self, num_sequences: int) -> bool:
            return True

        def propose(self, wanted: list[tuple[Sequence, int]], budget: int) -> list[list[int]]:
            return [[7, 8][:limit] for _, limit in wanted]

        def observe(self, seq: Sequence, proposed: int, accepted: int) -> None: ...

        def forget(self, seq: Sequence) -> None: ...

    for chosen, replay, error in (
        ([9, -1, -1], None, False),
        ([7, -1, 4], None, True),
        ([7, 8, -1], None, True),
        ([7, -1, 4], [6, 9, 9, 9, 9, 9], False),
        ([7, -1, 4], [6, 7, 9, 9, 9, 9], True),
    ):
        scheduler = Scheduler(SchedulerConfig(4, 64, (2,), 64), BlockPool(16, 4), Fixed())
        scheduler.add(
            Sequence(GenerationRequest("r", [1, 2, 3], SamplingParams(max_tokens=8), replay_token_ids=replay))
        )
        plan = scheduler.schedule()
        assert plan is not None
        assert scheduler.commit(plan, [[6]]) == []
        plan = scheduler.schedule()
        assert plan is not None
        finished = scheduler.commit(plan, [chosen])
        assert [seq.finish_reason for seq in finished] == (["error"] if error else [])


def test_a_servers_client_is_told_and_the_others_are_answered(llm: LLM) -> None:
    async def answers() -> tuple[str, int]:
        engine = AsyncEngine(llm.open_loop())
        engine.start()
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        streams = [
            engine.submit([GenerationRequest(engine.new_id(), ids, params)], lambda index, delta: None, whole=True)
            for ids in ([1, POISON, 5], [1, 20, 30])
        ]
        with pytest.raises(EngineFailedError, match="NaN") as error:
            await streams[0].take()
        tokens = [token for _, delta in await streams[1].take() for token in delta.token_ids]
        assert engine.num_unfinished == 0
        await asyncio.to_thread(engine.stop)
        return str(error.value), len(tokens)

    message, count = asyncio.run(answers())
    assert "output token 1" in message
    assert count == 5
