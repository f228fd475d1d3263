"""An honest run is VALID; every way of cheating or losing something that we know is INVALID, for the right reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.fidelity.tiny_model import EOS, VOCAB, TinyCheckpoint, tiny_checkpoint

from isologit.fidelity import (
    Certificate,
    NoiseFloor,
    Reference,
    ScoredRequest,
    certify,
    code_hash,
    draw_capture_plan,
    resolve_capture,
)
from isologit.fidelity.rescore import finish_problem

MAX_TOKENS = 12


@dataclass
class Run:
    """What a run hands over, and the certificate it gets."""

    records: list[ScoredRequest]
    captured: dict[tuple[str, int], np.ndarray]
    plan: dict[str, frozenset[int]]
    ids: list[str] = field(default_factory=lambda: [str(i) for i in range(12)])

    def certify(self, reference: Reference, **options: Any) -> Certificate:
        options = {"expected_ids": self.ids, "eos_token_ids": (EOS,), "capture_plan": self.plan, **options}
        found = certify(self.records, self.captured, reference, **options)
        json.dumps(found.to_dict(), allow_nan=False)
        assert found.statement().startswith(found.verdict.status)
        return found


def run(engine: Reference) -> Run:
    """A run of 12 requests on a model; the captured rows are those of its own tokens."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(12):
        prompt = [1, *rng.integers(3, VOCAB, 4 + i).tolist()]
        tokens = engine.generate(prompt, MAX_TOKENS, [EOS])
        finish = "stop" if tokens[-1] == EOS else "length"
        records.append(ScoredRequest(str(i), prompt, tokens, finish, MAX_TOKENS))
    plan = draw_capture_plan({r.request_id: r.max_tokens for r in records}, seed=3, rows=16)
    captured = {}
    for r in records:
        rows = engine.score(r.prompt_token_ids, r.token_ids)
        for index in resolve_capture(plan.get(r.request_id, ()), len(r.token_ids)):
            captured[r.request_id, index] = rows[index].copy()
    return Run(records, captured, plan)


@pytest.fixture
def honest(reference: Reference) -> Run:
    return run(reference)


def codes(certificate: Certificate) -> list[str]:
    assert certificate.verdict.status == "INVALID"
    return [reason.code for reason in certificate.reasons]


def test_an_honest_run_is_valid(honest: Run, reference: Reference) -> None:
    seen = []
    found = honest.certify(
        reference, hashes={"weights": "ab"}, num_refused=2, on_progress=lambda done, total: seen.append((done, total))
    )
    assert found.verdict.status == "VALID"
    assert seen == [(i, 12) for i in range(1, 13)]
    assert found.requests.all_rescored
    assert found.captured.rows == found.captured_rows_given == len(honest.captured) >= 12
    assert found.greedy is not None
    assert found.greedy.tokens == found.tokens_rescored == sum(len(r.token_ids) for r in honest.records)
    assert found.noise_floor is not None
    written = found.to_dict()
    assert written["hashes"] == {"weights": "ab"}
    assert written["requests"]["refused"] == 2
    assert written["tolerance"] == {"atol": 5e-3, "rtol": 0.0}
    assert written["reference"]["attention"] == "eager"
    assert written["greedy"]["top1_agreement"] > 0.99


def _scale_final_norm(checkpoint: TinyCheckpoint) -> None:
    checkpoint.tensors["model.norm.weight"] *= 1.01


def _scale_first_norm(checkpoint: TinyCheckpoint) -> None:
    checkpoint.tensors["model.layers.0.post_attention_layernorm.weight"] *= 1.01


def _swap_heads(checkpoint: TinyCheckpoint) -> None:
    weight = checkpoint.tensors["model.layers.1.self_attn.q_proj.weight"]  # [4 heads * 8, 32]
    heads = weight.view(4, 8, 32)
    checkpoint.tensors["model.layers.1.self_attn.q_proj.weight"] = heads[[1, 0, 2, 3]].reshape(32, 32)


def _round_to_bfloat16(checkpoint: TinyCheckpoint) -> None:
    checkpoint.tensors = {name: t.to(torch.bfloat16).float() for name, t in checkpoint.tensors.items()}


@pytest.mark.parametrize("change", [_scale_final_norm, _scale_first_norm, _swap_heads, _round_to_bfloat16])
def test_another_model_is_caught_by_its_captured_rows(
    change: Callable[[TinyCheckpoint], None], reference: Reference
) -> None:
    checkpoint = tiny_checkpoint()
    change(checkpoint)
    found = run(Reference(checkpoint, num_threads=1)).certify(reference)
    assert "over_tolerance" in codes(found)
    assert found.captured.worst is not None
    assert found.captured.worst.key in found.reasons[0].message


def test_right_rows_do_not_excuse_another_models_tokens(honest: Run, reference: Reference) -> None:
    checkpoint = tiny_checkpoint()
    _swap_heads(checkpoint)
    other = run(Reference(checkpoint, num_threads=1))
    for r in other.records:  # rows copied from the reference, as if its files had been handed out
        rows = reference.score(r.prompt_token_ids, r.token_ids)
        other.captured.update({key: rows[key[1]].copy() for key in other.captured if key[0] == r.request_id})
    found = other.certify(reference)
    assert codes(found) == ["not_greedy"]
    assert found.greedy is not None
    assert found.greedy.unexplained > 0
    first = found.greedy.divergences[0]
    assert not first.tie
    assert first.margin > found.greedy.tie_bound
    assert found.to_dict()["greedy"]["divergences"][0]["margin"] == first.margin


def test_tokens_of_another_request_are_caught(honest: Run, reference: Reference) -> None:
    uncaptured = [i for i, r in enumerate(honest.records) if r.request_id not in honest.plan]
    full = [i for i in uncaptured if honest.records[i].finish_reason == "length"]
    a, b = full[:2]
    honest.records[a] = replace(honest.records[a], token_ids=honest.records[b].token_ids)
    assert "not_greedy" in codes(honest.certify(reference))


def test_lost_doubled_unknown_and_failed_requests(honest: Run, reference: Reference) -> None:
    whole = list(honest.records)
    unplanned = next(r for r in whole if r.request_id not in honest.plan)
    honest.records = [r for r in whole if r is not unplanned]
    assert codes(honest.certify(reference)) == ["missing_requests"]
    honest.records = [*whole, whole[5]]
    assert codes(honest.certify(reference)) == ["duplicate_requests"]
    honest.records = [*whole, replace(whole[5], request_id="stranger")]
    assert codes(honest.certify(reference)) == ["unknown_requests"]
    honest.records = [replace(r, finish_reason="error", token_ids=()) if r is unplanned else r for r in whole]
    found = honest.certify(reference)
    assert codes(found) == ["failed_requests"]
    assert (found.requests.issued, found.requests.completed, found.requests.failed) == (12, 11, 1)


def test_broken_and_missing_rows(honest: Run, reference: Reference) -> None:
    key = next(iter(honest.captured))
    good = honest.captured[key]
    bad = good.copy()
    bad[3] = np.nan
    cases: list[tuple[np.ndarray, str]] = [
        (bad, "not_finite"),
        (good[:-1], "shape"),
        (good[None], "shape"),
        (good.astype(np.float64), "dtype"),
        (good + np.float32(6e-3), "over_tolerance"),
    ]
    for rows, code in cases:
        honest.captured[key] = rows
        assert codes(honest.certify(reference)) == [code]
    del honest.captured[key]
    assert codes(honest.certify(reference)) == ["missing_captured_rows"]
    honest.captured = {("0", MAX_TOKENS): good, ("nobody", 0): good}
    assert codes(honest.certify(reference, capture_plan={})) == ["unknown_captured_rows", "no_captured_rows"]
    honest.captured = {}
    assert codes(honest.certify(reference, capture_plan={})) == ["no_captured_rows"]


ENDINGS = [
    # tokens, finish_reason, options, problem; EOS is 2, three tokens are asked for
    ((5, 6, 7), "length", {}, None),
    ((5, 6, 2), "stop", {}, None),
    ((5, 6, 2), "length", {}, None),  # both at once
    ((2,), "stop", {}, None),
    ((5, 6), "length", {}, '"length" after 2 of 3'),
    ((5, 6), "stop", {}, "does not end a request"),
    ((), "stop", {}, "does not end a request"),
    ((), "length", {}, '"length" after 0 of 3'),
    ((5, 6, 7, 8), "length", {}, "4 tokens, 3 were asked for"),
    ((5, 2, 7), "length", {}, "token 1 ends the request, and 1 more follow"),
    ((5, 2, 7), "length", {"ignore_eos": True}, None),
    ((5, 2), "stop", {"ignore_eos": True}, "does not end a request"),
    ((5, 6), "stop", {"stop_token_ids": (6,)}, None),
    ((6, 5, 7), "length", {"stop_token_ids": (6,)}, "token 0 ends the request"),
    ((5, 6), "stop", {"stop_strings": True}, None),
]


@pytest.mark.parametrize(("tokens", "finish", "options", "problem"), ENDINGS)
def test_where_a_request_may_end(
    tokens: tuple[int, ...], finish: str, options: dict[str, Any], problem: str | None
) -> None:
    found = finish_problem(ScoredRequest("a", [1], tokens, finish, 3, **options), (2,))
    if problem is None:
        assert found is None
    else:
        assert found is not None
        assert problem in found


def test_an_answer_cut_short_makes_the_run_invalid(honest: Run, reference: Reference) -> None:
    at = next(i for i, r in enumerate(honest.records) if r.request_id not in honest.plan)
    good = honest.records[at]
    honest.records[at] = replace(good, token_ids=good.token_ids[:-1], finish_reason="stop")
    found = honest.certify(reference)
    assert codes(found) == ["wrong_finish"]
    assert f"request {good.request_id}:" in found.reasons[0].message
    honest.records[at] = replace(good, token_ids=())
    assert codes(honest.certify(reference)) == ["wrong_finish"]


def test_ids_outside_the_vocabulary(honest: Run, reference: Reference) -> None:
    r = honest.records[0]
    honest.records[0] = replace(r, token_ids=[*r.token_ids[:-1], VOCAB])
    assert "bad_tokens" in codes(honest.certify(reference))


def test_a_budget_makes_a_sample_of_stated_size(honest: Run, reference: Reference) -> None:
    found = honest.certify(reference, max_requests=len(honest.plan) + 1, seed=5)
    assert found.verdict.status == "VALID"
    assert found.requests.rescored == len(honest.plan) + 1
    assert found.captured.rows == len(honest.captured)
    assert not found.requests.all_rescored
    assert f"a random sample (seed 5) of {len(honest.plan) + 1} of 12" in found.statement()
    hurried = honest.certify(reference, time_budget_s=0.0)
    assert hurried.requests.rescored == 1
    assert 0 < hurried.captured.rows < hurried.captured_rows_given


@pytest.mark.parametrize("mode", ["replay", "sampled"])
def test_without_the_greedy_check_rows_still_decide(mode: Any, honest: Run, reference: Reference) -> None:
    rng = np.random.default_rng(1)
    honest.records = [replace(r, token_ids=rng.integers(3, VOCAB, 6).tolist(), max_tokens=6) for r in honest.records]
    honest.records = [replace(r, finish_reason="length") for r in honest.records]
    given = {r.request_id: list(r.token_ids) for r in honest.records}
    rows = {r.request_id: reference.score(r.prompt_token_ids, r.token_ids) for r in honest.records}
    honest.plan = draw_capture_plan(dict.fromkeys(honest.ids, 6), seed=0, rows=8)
    honest.captured = {
        (i, index): rows[i][index].copy() for i, wanted in honest.plan.items() for index in resolve_capture(wanted, 6)
    }
    found = honest.certify(reference, mode=mode, replayed=given)
    assert found.verdict.status == "VALID"
    assert found.requests.rescored == len(honest.plan)
    assert re.search("greedy check is left out", found.statement())
    assert found.to_dict()["greedy"]["checked"] is False
    key = next(iter(honest.captured))
    honest.captured[key][0] += 0.01
    assert codes(honest.certify(reference, mode=mode)) == ["over_tolerance"]


def test_a_replay_must_give_back_its_tokens(honest: Run, reference: Reference) -> None:
    given = {r.request_id: list(r.token_ids) for r in honest.records}
    assert honest.certify(reference, mode="replay", replayed=given).verdict.status == "VALID"
    given["0"] = [5, *given["0"]]
    assert codes(honest.certify(reference, mode="replay", replayed=given)) == ["replay_differs"]


class FakeReference:
    """A reference of one request and three tokens with chosen rows and noise."""

    vocab_size = 4

    def __init__(self, rows: list[list[float]], noise: float) -> None:
        self.rows, self.noise = np.array(rows, np.float32), noise

    def identity(self) -> dict[str, str]:
        return {"class": "Fake", "attention": "none", "dtype": "float32"}

    def score_all(self, samples: object, **options: object) -> Iterator[np.ndarray]:
        yield self.rows

    def noise_floor(self, samples: object) -> NoiseFloor:
        return NoiseFloor(self.noise, 1, 1)


def _one_request(margin: float, *, observed: float = 0.0, noise: float = 0.0) -> Certificate:
    """Token 1 is chosen where the reference prefers token 0 by `margin`; one captured row is off by `observed`."""
    fake = FakeReference([[margin, 0.0, -5.0, -5.0], [3.0, 0.0, 0.0, 0.0]], noise)
    captured = {("a", 1): fake.rows[1] + np.array([0, 0, 0, observed], np.float32)}
    records = [ScoredRequest("a", [1], [1, 0], "length", 2)]
    return certify(records, captured, fake, expected_ids=["a"], eos_token_ids=())


def test_a_tie_needs_a_margin_that_rounding_explains() -> None:
    found = _one_request(1.9e-4, noise=1e-4)
    assert found.verdict.status == "VALID"
    assert found.greedy is not None
    assert (found.greedy.agreed, found.greedy.ties, found.greedy.unexplained) == (1, 1, 0)
    assert found.to_dict()["greedy"]["divergences"] == [
        {
            "request_id": "a",
            "output_index": 0,
            "ours": 1,
            "theirs": 0,
            "margin": found.greedy.divergences[0].margin,
            "tie": True,
        }
    ]
    assert codes(_one_request(2.1e-4, noise=1e-4)) == ["not_greedy"]
    assert _one_request(1.9e-3, observed=1e-3).verdict.status == "VALID"
    assert codes(_one_request(2.1e-3, observed=1e-3)) == ["not_greedy"]


def test_no_noise_explains_more_than_twice_the_tolerance() -> None:
    assert _one_request(9.9e-3, noise=1.0).verdict.status == "VALID"
    assert codes(_one_request(1.01e-2, noise=1.0)) == ["not_greedy"]


def test_a_reference_that_is_not_finite_proves_nothing() -> None:
    fake = FakeReference([[np.nan, 0.0, 0.0, 0.0]], 0.0)
    captured = {("a", 0): np.zeros(4, np.float32)}
    found = certify([ScoredRequest("a", [1], [0], "length", 1)], captured, fake, expected_ids=["a"], eos_token_ids=())
    assert "reference_not_finite" in codes(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_code_hash_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "sub" / "b.py").write_text("y = 2\n")
    first = code_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("ignored")
    assert code_hash(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "c.py")
    renamed = code_hash(tmp_path)
    (tmp_path / "c.py").write_text("x = 2\n")
    assert len({first, renamed, code_hash(tmp_path)}) == 3
    assert code_hash() == code_hash()
