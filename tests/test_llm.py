"""The engine against transformers, and against itself at every batch size, order and speculation setting."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from isologit import LLM, GenerationRequest, RequestOutput, SamplingParams
from isologit.backends.batch import FlatBatch
from isologit.backends.cpu.heads import heads_suit
from isologit.backends.cpu.simd import BYTE_PRODUCTS, PANEL_WIDTH
from isologit.engine.captured_rows import LAST_TOKEN
from isologit.errors import ConfigError, ModelError, RequestError

VOCAB = 300
SHAPES = {
    "mha-untied-float32": {"heads": 4, "kv_heads": 4, "tied": False, "dtype": torch.float32},
    "gqa-tied-float16": {"heads": 6, "kv_heads": 2, "tied": True, "dtype": torch.float16},
    "mqa-untied-bfloat16": {"heads": 3, "kv_heads": 1, "tied": False, "dtype": torch.bfloat16},
}


def save_model(
    folder: Path, *, heads: int, kv_heads: int, tied: bool, dtype: torch.dtype, head_dim: int = 16
) -> LlamaForCausalLM:
    """A small random model, saved in `dtype`, and its float32 twin as transformers runs it."""
    torch.manual_seed(heads)
    config = LlamaConfig(
        hidden_size=heads * head_dim,
        intermediate_size=100,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        initializer_range=0.2 * math.sqrt(16 / head_dim),  # wider layers of such weights would only amplify rounding
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    model.to(dtype).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_model(folder, **SHAPES[request.param])


def workload(count: int, seed: int = 0, **params: Any) -> tuple[list[dict[str, Any]], list[SamplingParams]]:
    """Prompts that share beginnings and repeat themselves, so that prefix reuse and look-up have something to find."""
    rng = np.random.default_rng(seed)
    shared = [int(t) for t in rng.integers(3, VOCAB, 40)]
    prompts, sampling = [], []
    for _ in range(count):
        own = [int(t) for t in rng.integers(3, VOCAB, rng.integers(1, 30))]
        prompts.append({"prompt_token_ids": [1, *shared[: int(rng.integers(0, 40))], *own, *own[:5]]})
        sampling.append(SamplingParams(max_tokens=int(rng.integers(1, 50)), **params))
    return prompts, sampling


def reference_rows(model: LlamaForCausalLM, output: RequestOutput) -> np.ndarray:
    ids = output.prompt_token_ids + output.token_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    return logits[len(output.prompt_token_ids) - 1 : len(ids) - 1]


def test_greedy_equals_transformers(model: tuple[Path, LlamaForCausalLM]) -> None:
    folder, reference = model
    prompts, sampling = workload(24, return_logits=True)
    outputs = LLM(folder).generate(prompts, sampling)
    for output, params in zip(outputs, sampling, strict=True):
        rows = reference_rows(reference, output)
        assert output.logits is not None
        assert np.abs(output.logits - rows).max() < 1e-4
        assert output.token_ids == rows.argmax(1).tolist()
        ended = output.token_ids[-1] == 2
        assert output.finish_reason == ("stop" if ended else "length")
        assert ended or len(output.token_ids) == params.max_tokens


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 7, "max_num_batched_tokens": 9},
        {"max_num_seqs": 64, "max_num_batched_tokens": 64, "enable_prefix_caching": False},
        {"max_num_seqs": 256, "longest_first": False},
        {"max_num_seqs": 3, "speculative_config": {}},
        {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "speculative_config": {"num_speculative_tokens": 3}},
        {"num_threads": 1},
        {"num_threads": 3, "max_num_seqs": 5},
    ],
)
def test_logits_are_bit_identical_whatever_the_batch(
    model: tuple[Path, LlamaForCausalLM], options: dict[str, Any]
) -> None:
    folder, _ = model
    prompts, sampling = workload(20, seed=1, return_logits=True)
    plain = LLM(folder, speculative_config=None).generate(prompts, sampling)
    reversed_outputs = LLM(folder, **options).generate(prompts[::-1], sampling[::-1])
    for a, b in zip(plain, reversed_outputs[::-1], strict=True):
        assert a.token_ids == b.token_ids
        assert np.array_equal(a.logits, b.logits)


@pytest.mark.parametrize("slots", [1, 20])
def test_a_draft_model_saves_steps_and_changes_no_bit(model: tuple[Path, LlamaForCausalLM], slots: int) -> None:
    folder, _ = model
    prompts, sampling = workload(20, seed=1, return_logits=True)
    plain = LLM(folder, max_num_seqs=slots, speculative_config=None)
    llm = LLM(folder, max_num_seqs=slots, speculative_config={"model": str(folder), "num_speculative_tokens": 4})
    llm._make_proposer = _free_of_charge(llm._make_proposer)  # type: ignore[method-assign]
    outputs = llm.generate(prompts, sampling)
    for a, b in zip(plain.generate(prompts, sampling), outputs, strict=True):
        assert a.token_ids == b.token_ids
        assert np.array_equal(a.logits, b.logits)
    assert len(llm.step_records) < 0.5 * len(plain.step_records)
    assert sum(step.num_accepted_tokens for step in llm.step_records) > 100


def _free_of_charge(make: Any) -> Any:
    """Models are so small here that by its price, or on a busy machine, a draft would not be made."""

    def made(max_rows: int) -> Any:
        proposer = make(max_rows)
        proposer._row_cost = lambda rows: 0.0
        return proposer

    return made


def test_a_draft_model_of_another_vocabulary_is_refused(model: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB + 1
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="vocabulary"):
        LLM(model[0], speculative_config={"model": str(tmp_path)})
    with pytest.raises(ConfigError, match="draft_model"):
        LLM(model[0], speculative_config={"method": "draft_model"})


@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 4, "kv_heads": 4, "head_dim": PANEL_WIDTH},
        {"heads": 4, "kv_heads": 2, "head_dim": 2 * PANEL_WIDTH},
    ],
)
def test_steps_that_go_head_by_head_change_no_bit(shape: dict[str, int], tmp_path: Path) -> None:
    reference = save_model(tmp_path, **shape, tied=False, dtype=torch.float32)
    prompts, sampling = workload(40, seed=1, return_logits=True)
    together = LLM(tmp_path, max_num_seqs=64, num_threads=2)
    outputs = together.generate(prompts, sampling)
    assert heads_suit(40, shape["kv_heads"], shape["head_dim"], 2)
    assert sum(step.num_tokens >= 24 for step in together.step_records) > 10
    assert not heads_suit(3, shape["kv_heads"], shape["head_dim"], 2)
    few = LLM(tmp_path, max_num_seqs=3, max_num_batched_tokens=3, num_threads=2).generate(prompts, sampling)
    uneven = LLM(tmp_path, max_num_seqs=64, num_threads=3).generate(prompts, sampling)
    for a, b, c in zip(outputs, few, uneven, strict=True):
        assert a.token_ids == b.token_ids == c.token_ids
        assert np.array_equal(a.logits, b.logits)
        assert np.array_equal(a.logits, c.logits)
        assert a.logits is not None
        assert np.abs(a.logits - reference_rows(reference, a)).max() < 1e-4


@pytest.mark.parametrize("return_logits", [True, False])
def test_threads_with_sequences_of_their_own_change_no_bit(
    return_logits: bool, model: tuple[Path, LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with threads that compute everything together; bounds help each other's rows along in between."""
    folder, _ = model
    prompts, sampling = workload(90, seed=3, return_logits=return_logits)
    threads = 3
    apart = LLM(folder, max_num_seqs=90, num_threads=threads)
    taken: list[int] = []
    parts = apart._model._parts

    def counted(batch: FlatBatch) -> list[FlatBatch]:
        found = parts(batch)
        taken.append(len(found))
        return found

    monkeypatch.setattr(apart._model, "_parts", counted)
    outputs = apart.generate(prompts, sampling)
    assert taken.count(threads) > 3
    assert 1 in taken, "few rows are computed together"
    together = LLM(folder, max_num_seqs=90, num_threads=threads)
    monkeypatch.setattr(together._model, "_parts", lambda batch: [batch])
    for a, b in zip(outputs, together.generate(prompts, sampling), strict=True):
        assert a.token_ids == b.token_ids
        if return_logits:
            assert np.array_equal(a.logits, b.logits)


def test_bit_identity_is_not_a_property_of_any_matrix_product() -> None:
    """The inverse: the library's product does change a row with the batch, or this claim would be empty."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(768, 2048, generator=generator)
    x = torch.randn(64, 2048, generator=generator)
    together = torch.nn.functional.linear(x, weight)
    differs = any(not torch.equal(torch.nn.functional.linear(x[:n], weight), together[:n]) for n in (1, 2, 3, 5, 9, 17))
    if not differs:
        pytest.skip("this machine's matrix product happens to be batch invariant")


def test_speculation_shortens_the_run_and_prefixes_are_reused(model: tuple[Path, LlamaForCausalLM]) -> None:
    folder, _ = model
    prompt = {"prompt_token_ids": [1, *[5, 6, 7, 8, 9] * 12]}
    llm = LLM(folder, max_num_seqs=1, speculative_config={})
    llm._make_proposer = _free_of_charge(llm._make_proposer)  # type: ignore[method-assign]
    request = GenerationRequest(
        "a", prompt["prompt_token_ids"], SamplingParams(max_tokens=40), replay_token_ids=[5, 6, 7, 8, 9] * 8
    )
    assert next(iter(llm.run([request]))).token_ids == [5, 6, 7, 8, 9] * 8
    assert len(llm.step_records) < 40
    twice = LLM(folder, max_num_seqs=1, max_num_batched_tokens=256)
    twice.generate([prompt, prompt], SamplingParams(max_tokens=1))
    assert twice.step_records[1].num_tokens < twice.step_records[0].num_tokens


def test_captured_rows_are_the_rows_that_chose_the_tokens(model: tuple[Path, LlamaForCausalLM]) -> None:
    folder, _ = model
    prompts, _ = workload(6, seed=2)
    params = SamplingParams(max_tokens=12, return_logits=True, ignore_eos=True)
    llm = LLM(folder, speculative_config={})
    capture = frozenset({0, 5, LAST_TOKEN})
    requests = [
        GenerationRequest(str(i), p["prompt_token_ids"], params, capture=capture) for i, p in enumerate(prompts)
    ]
    for output in llm.run(requests):
        assert sorted(output.captured) == [0, 5, 11]
        for index, row in output.captured.items():
            assert output.logits is not None
            assert np.array_equal(row, output.logits[index])


def test_replay_forces_the_tokens_and_computes_their_logits(model: tuple[Path, LlamaForCausalLM]) -> None:
    folder, reference = model
    forced = [int(t) for t in np.random.default_rng(5).integers(3, VOCAB, 15)]
    params = SamplingParams(max_tokens=20, return_logits=True)
    output = next(iter(LLM(folder).run([GenerationRequest("a", [1, 4, 9], params, replay_token_ids=forced)])))
    assert output.token_ids == forced
    assert np.abs(output.logits - reference_rows(reference, output)).max() < 1e-4


def test_sampling_is_seeded_and_logprobs_are_normalised(model: tuple[Path, LlamaForCausalLM]) -> None:
    folder, _ = model
    prompt = {"prompt_token_ids": [1, 7, 8]}
    params = SamplingParams(max_tokens=20, temperature=1.5, top_k=50, top_p=0.95, seed=3, logprobs=4, ignore_eos=True)
    first, second = LLM(folder).generate([prompt, prompt], params)
    assert first.token_ids == second.token_ids
    other = LLM(folder).generate(prompt, SamplingParams(max_tokens=20, temperature=1.5, seed=4, ignore_eos=True))[0]
    assert other.token_ids != first.token_ids
    assert first.logprobs is not None
    for token, values in zip(first.token_ids, first.logprobs, strict=True):
        assert token in values
        assert 4 <= len(values) <= 5
        assert sum(math.exp(v) for v in values.values()) <= 1.0 + 1e-9


@pytest.mark.filterwarnings("error")
def test_a_tiny_temperature_is_greedy(model: tuple[Path, LlamaForCausalLM]) -> None:
    llm, prompt = LLM(model[0]), {"prompt_token_ids": [1, 7, 8]}
    greedy, cold = (llm.generate(prompt, SamplingParams(max_tokens=9, temperature=t))[0] for t in (0.0, 1e-308))
    assert cold.token_ids == greedy.token_ids


@pytest.mark.parametrize("count", [0, 3])
def test_logprobs_may_be_the_logits_themselves(model: tuple[Path, LlamaForCausalLM], count: int) -> None:
    llm = LLM(model[0], logprobs_mode="raw_logits")
    params = SamplingParams(max_tokens=6, logprobs=count, return_logits=True, ignore_eos=True)
    output = llm.generate({"prompt_token_ids": [1, 7, 8]}, params)[0]
    assert output.logits is not None
    assert output.logprobs is not None
    for token, row, values in zip(output.token_ids, output.logits, output.logprobs, strict=True):
        assert values[token] == row[token] == row.max()
        assert len(values) == max(1, count)
    with pytest.raises(ConfigError, match="logprobs_mode"):
        LLM(model[0], logprobs_mode="probabilities")  # type: ignore[arg-type]


def test_min_tokens_and_repetition_penalty_are_honoured(model: tuple[Path, LlamaForCausalLM]) -> None:
    folder, _ = model
    prompts, _ = workload(20, seed=3)
    for output in LLM(folder).generate(prompts, SamplingParams(max_tokens=30, min_tokens=25)):
        assert len(output.token_ids) >= 25
    penalised = LLM(folder).generate(
        prompts[0], SamplingParams(max_tokens=30, repetition_penalty=50.0, ignore_eos=True)
    )
    assert len(set(penalised[0].token_ids)) == 30


def test_abort_returns_what_there_is_and_the_others_go_on(model: tuple[Path, LlamaForCausalLM]) -> None:
    folder, _ = model
    llm = LLM(folder, max_num_seqs=4, longest_first=False)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    run = llm.run([GenerationRequest("short", [1, 2], SamplingParams(max_tokens=3, ignore_eos=True))]
                  + [GenerationRequest(str(i), [1, 3 + i], params) for i in range(6)])  # fmt: skip
    assert next(run).request_id == "short"
    aborted = llm.abort("2")
    assert aborted is not None
    assert aborted.finish_reason == "abort"
    assert llm.abort("nobody") is None
    assert sorted(output.request_id for output in run) == ["0", "1", "3", "4", "5"]


@pytest.mark.parametrize(
    ("ids", "max_tokens", "message"),
    [([], 1, "empty"), ([VOCAB], 1, "outside"), ([1] * 250, 7, "context length is 256")],
)
def test_impossible_requests_are_refused_before_any_work(
    model: tuple[Path, LlamaForCausalLM], ids: list[int], max_tokens: int, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        LLM(model[0]).generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=max_tokens))


def test_worker_threads_end_with_the_engine(model: tuple[Path, LlamaForCausalLM]) -> None:
    def workers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("isologit-")}

    before = workers()
    llm = LLM(model[0], num_threads=3)
    assert len(workers() - before) == 2
    llm.close()
    assert workers() == before


def test_text_needs_a_tokenizer_and_options_are_checked(model: tuple[Path, LlamaForCausalLM]) -> None:
    llm = LLM(model[0])
    with pytest.raises(RequestError, match="no tokenizer"):
        llm.generate("hello")
    with pytest.raises(ConfigError, match="at least 1"):
        LLM(model[0], max_num_seqs=0)
    with pytest.raises(RequestError, match="keys and values"):
        LLM(model[0], kv_cache_memory_bytes=1).generate({"prompt_token_ids": [1]}, SamplingParams(max_tokens=4))


@pytest.mark.parametrize(
    ("biased", "kept"),
    [
        ({"attention_bias": True}, "qkvo"),
        ({"attention_bias": True}, "qkv"),  # as Qwen's layers have them
        ({"mlp_bias": True}, ""),
        ({"attention_bias": True, "mlp_bias": True}, "qkvo"),
    ],
)
def test_biases_are_computed(biased: dict[str, bool], kept: str, tmp_path: Path) -> None:
    """For steps of every size, by item and by head, and the same bits in each."""
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=2 * PANEL_WIDTH,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
        **biased,
    )
    reference = LlamaForCausalLM(config).eval()
    for name, parameter in reference.named_parameters():
        if name.endswith("bias"):
            with torch.no_grad():
                parameter.normal_(std=0.5)
                if "self_attn" in name and name.split(".")[-2][0] not in kept:
                    parameter.zero_()
    reference.save_pretrained(tmp_path)
    prompts, sampling = workload(40, seed=6, return_logits=True)
    together = LLM(tmp_path, max_num_seqs=64, num_threads=2).generate(prompts, sampling)
    few = LLM(tmp_path, max_num_seqs=3, max_num_batched_tokens=3, num_threads=2).generate(prompts, sampling)
    for a, b in zip(together, few, strict=True):
        assert a.token_ids == b.token_ids
        assert np.array_equal(a.logits, b.logits)
        assert a.logits is not None
        assert np.abs(a.logits - reference_rows(reference, a)).max() < 1e-4


def test_rope_scaling_beside_rope_parameters_counts(tmp_path: Path) -> None:
    plain = save_model(tmp_path, **SHAPES["mha-untied-float32"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_scaling": {"type": "linear", "factor": 4.0}}))
    scaled = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    llm = LLM(tmp_path)
    assert llm.max_model_len == 4 * 256
    prompt = [1, *(3 + 7 * i % 290 for i in range(300))]  # longer than the context without scaling
    params = SamplingParams(max_tokens=4, ignore_eos=True, return_logits=True)
    (output,) = llm.generate({"prompt_token_ids": prompt}, params)
    assert output.logits is not None
    assert np.abs(output.logits - reference_rows(scaled, output)).max() < 1e-3
    assert np.abs(output.logits - reference_rows(plain, output)).max() > 0.1


def test_tokens_without_whole_logits_are_those_of_whole_logits(model: tuple[Path, LlamaForCausalLM]) -> None:
    """Steps that only choose use bytes of the last product, where the CPU can."""
    folder, _ = model
    prompts, sampling = workload(20, seed=4)
    chosen = LLM(folder).generate(prompts, sampling)
    prompts, sampling = workload(20, seed=4, return_logits=True)
    whole = LLM(folder).generate(prompts, sampling)
    assert [output.token_ids for output in chosen] == [output.token_ids for output in whole]


@pytest.mark.parametrize("hold_s", [0.0, 1e9])
def test_outputs_with_captured_rows_wait_for_others_but_not_long(
    model: tuple[Path, LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch, hold_s: float
) -> None:
    monkeypatch.setattr("isologit.engine.captured_rows.LONGEST_HOLD_S", hold_s)
    llm = LLM(model[0], max_num_seqs=1, speculative_config=None)
    requests = [
        GenerationRequest(name, [1, 4, 9], SamplingParams(max_tokens=5, ignore_eos=True), capture=frozenset({0}))
        for name in "abc"
    ]
    steps_before = {output.request_id: len(llm.step_records) for output in llm.run(requests)}
    assert list(steps_before) == list("abc")
    assert list(steps_before.values()) == ([15, 15, 15] if hold_s else [5, 10, 15])


@pytest.mark.skipif(BYTE_PRODUCTS is None, reason="this CPU multiplies no bytes, so the whole product is always taken")
def test_bounds_that_leave_too_much_open_are_not_used_for_a_while(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=400 * PANEL_WIDTH,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    lost = LlamaForCausalLM(config)
    torch.nn.init.constant_(lost.lm_head.weight, 0.5)  # all logits are equal
    lost.save_pretrained(tmp_path)
    llm = LLM(tmp_path)
    outputs = llm.generate([{"prompt_token_ids": [1, 5]}], SamplingParams(max_tokens=3, ignore_eos=True))
    assert outputs[0].token_ids == [0, 0, 0]
    assert llm._model._steps_without_bounds > 0
    with torch.no_grad():
        lost.lm_head.weight.normal_()
    lost.save_pretrained(tmp_path)
    llm = LLM(tmp_path)
    llm.generate([{"prompt_token_ids": [1, 5]}], SamplingParams(max_tokens=3, ignore_eos=True))
    assert llm._model._steps_without_bounds == 0
