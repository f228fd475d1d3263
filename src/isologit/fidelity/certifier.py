"""Checking a finished run against the reference.

Owns the order of the checks and what makes a run INVALID. It does not know how the run was made: it sees requests with
their tokens, captured logits rows, and a reference.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from isologit.common.verdict import Reason
from isologit.fidelity.certificate import Certificate, GreedyCheck, Mode, RequestCounts
from isologit.fidelity.compare import ATOL, ComparisonAccumulator
from isologit.fidelity.plan import resolve_capture
from isologit.fidelity.reference import NoiseFloor, Sample, noise_samples
from isologit.fidelity.rescore import Divergence, ScoredRequest, bad_token, find_divergences, finish_problem

_NAMED = 5  # ids or places named in a reason


class ScoringReference(Protocol):
    """What `certify` needs of a reference; `Reference` and `StreamedReference` have it."""

    vocab_size: int

    def identity(self) -> dict[str, str]: ...
    def score_all(
        self,
        samples: Sequence[Sample],
        *,
        time_budget_s: float | None = None,
        on_progress: Callable[[float, int], None] | None = None,
    ) -> Iterator[np.ndarray]: ...
    def noise_floor(self, samples: Sequence[Sample]) -> NoiseFloor: ...


def certify(
    records: Iterable[ScoredRequest],
    captured: Mapping[tuple[str, int], np.ndarray],
    reference: ScoringReference,
    *,
    expected_ids: Iterable[str],
    eos_token_ids: Collection[int],
    capture_plan: Mapping[str, Collection[int]] | None = None,
    mode: Mode = "greedy",
    replayed: Mapping[str, Sequence[int]] | None = None,
    num_refused: int = 0,
    atol: float = ATOL,
    rtol: float = 0.0,
    max_requests: int | None = None,
    time_budget_s: float | None = None,
    seed: int = 0,
    hashes: Mapping[str, str] | None = None,
    on_progress: Callable[[float, int], None] | None = None,
) -> Certificate:
    """Decide whether a run's outputs and logits are the reference's, and say what the decision rests on.

    records: every request of the run, failed ones included. captured: float32 [vocab] rows by request id and output
    index. expected_ids: what was issued; each must come back once, and one that failed while running makes the run
    INVALID, since it made the time shorter. num_refused: requests that were never issued because they cannot run; only
    counted. capture_plan: what `draw_capture_plan` drew; every row it asks for and the outputs allow must be there.

    mode: "greedy" checks every re-scored output token against the reference's argmax. "replay" and "sampled" leave that
    check out; the captured rows are compared all the same, given the run's own tokens before them. replayed: the tokens
    that had to come out, by request id. All modes but replay also check that every request ended where it should.

    max_requests, time_budget_s: the reference scores requests in a random order drawn from `seed`, those with captured
    rows first, until one of the two is used up (at least one is scored). on_progress(done, of) counts them; a streamed
    reference tells fractions.

    A token that is not the argmax is a tie when the reference's margin is at most twice the larger of the largest
    captured difference and the noise floor (both tokens' logits may each be off by that much), and never more than
    twice atol. Any other makes the run INVALID, as does a captured value over the tolerance or not finite, and a run
    without captured rows. No exception is raised for what a run did wrong.
    """
    listed = list(records)
    expected = list(expected_ids)
    reasons = _conservation(listed, expected)
    completed = {r.request_id: r for r in listed if r.completed}
    reasons += _endings(completed.values(), eos_token_ids, mode, replayed or {})
    reasons += _capture_keys(captured, completed, capture_plan or {})
    if not captured:
        reasons.append(Reason("no_captured_rows", "nothing was checked: the run handed over no captured logits rows"))

    strange = {id_: bad for id_, r in completed.items() if (bad := bad_token(r, reference.vocab_size)) is not None}
    if strange:
        reasons.append(Reason("bad_tokens", f"token ids outside the vocabulary in requests {_names(strange)}"))
    order = _order(completed, captured, set(strange), with_rest=mode == "greedy", seed=seed)
    scored = _score(order, captured, reference, mode, atol, rtol, max_requests, time_budget_s, on_progress)
    comparison = scored.rows.result()
    reasons += comparison.reasons("captured ")
    if scored.broken:
        reasons.append(
            Reason("reference_not_finite", f"the reference's own logits are not finite in {_names(scored.broken)}")
        )
    if captured and not comparison.rows and comparison.first_problem is None:
        reasons.append(Reason("no_captured_rows", "nothing was checked: no captured row could be compared"))

    noise = _noise_floor(reference, scored.done)
    greedy = None
    if mode == "greedy":
        bound = 2 * min(atol, max(comparison.max_abs, noise.max_abs if noise else 0.0))
        greedy = _classify(scored.num_tokens, scored.divergences, bound)
        reasons += _greedy_reasons(greedy)
    return Certificate(
        reasons=tuple(reasons),
        mode=mode,
        requests=RequestCounts(
            issued=len(expected),
            completed=len(completed),
            failed=sum(not r.completed for r in listed),
            refused=num_refused,
            rescored=len(scored.done),
        ),
        captured=comparison,
        captured_rows_given=len(captured),
        tokens_rescored=scored.num_tokens,
        greedy=greedy,
        noise_floor=noise,
        seed=seed,
        rescoring_s=scored.seconds,
        reference=reference.identity(),
        hashes=dict(hashes or {}),
    )


class _Scored:
    """What the reference found, request by request."""

    def __init__(self, atol: float, rtol: float) -> None:
        self.rows = ComparisonAccumulator(atol=atol, rtol=rtol)
        self.done: list[ScoredRequest] = []
        self.broken: list[str] = []
        self.divergences: list[Divergence] = []
        self.num_tokens = 0
        self.seconds = 0.0


def _score(
    order: Sequence[ScoredRequest],
    captured: Mapping[tuple[str, int], np.ndarray],
    reference: ScoringReference,
    mode: Mode,
    atol: float,
    rtol: float,
    max_requests: int | None,
    time_budget_s: float | None,
    on_progress: Callable[[float, int], None] | None,
) -> _Scored:
    """Score requests in order until the budget is used up."""
    indices: dict[str, list[int]] = {}
    for request_id, index in sorted(captured):
        indices.setdefault(request_id, []).append(index)
    found = _Scored(atol, rtol)
    total = len(order) if max_requests is None else min(len(order), max(1, max_requests))
    samples = [(request.prompt_token_ids, request.token_ids) for request in order[:total]]
    if not samples:
        return found
    start = time.perf_counter()
    scores = reference.score_all(samples, time_budget_s=time_budget_s, on_progress=on_progress)
    # NOTE: scores come first in the pairs, so that they are asked for the end, which they may have to tell.
    for rows, request in zip(scores, order, strict=False):
        if not np.isfinite(rows).all():
            found.broken.append(request.request_id)
        if mode == "greedy":
            found.divergences += find_divergences(request, rows)
        for index in indices.get(request.request_id, ()):
            if 0 <= index < len(rows):
                key = f"request {request.request_id} output token {index}"
                found.rows.add(key, np.asarray(captured[request.request_id, index]), rows[index])
        found.done.append(request)
        found.num_tokens += len(request.token_ids)
    found.seconds = time.perf_counter() - start
    return found


def _conservation(records: Sequence[ScoredRequest], expected: Sequence[str]) -> list[Reason]:
    """Every issued id exactly once, nothing else, and none failed."""
    issued, seen = Counter(expected), Counter(r.request_id for r in records)
    failed = [r.request_id for r in records if not r.completed]
    found = [
        ("missing_requests", sorted(issued - seen), "were issued and have no result"),
        ("duplicate_requests", sorted(i for i in seen if i in issued and seen[i] > issued[i]), "have several results"),
        ("unknown_requests", sorted(i for i in seen if i not in issued), "have a result and were never issued"),
        ("failed_requests", failed, "failed while running, which made the time shorter"),
    ]
    return [Reason(code, f"{len(ids)} requests {what}: {_names(ids)}") for code, ids, what in found if ids]


def _endings(
    completed: Iterable[ScoredRequest],
    eos_token_ids: Collection[int],
    mode: Mode,
    replayed: Mapping[str, Sequence[int]],
) -> list[Reason]:
    """Requests that ended where they should not have, or replayed other tokens than they were given."""
    if mode == "replay":
        other = [r.request_id for r in completed if list(replayed.get(r.request_id, r.token_ids)) != list(r.token_ids)]
        message = f"{len(other)} requests did not replay the tokens they were given: {_names(other)}"
        return [Reason("replay_differs", message)] if other else []
    wrong = [(r.request_id, problem) for r in completed if (problem := finish_problem(r, eos_token_ids)) is not None]
    if not wrong:
        return []
    return [Reason("wrong_finish", f"{len(wrong)} requests ended wrongly; request {wrong[0][0]}: {wrong[0][1]}")]


def _capture_keys(
    captured: Mapping[tuple[str, int], np.ndarray],
    completed: Mapping[str, ScoredRequest],
    plan: Mapping[str, Collection[int]],
) -> list[Reason]:
    """Rows the plan asks for that are not there, and rows of tokens that do not exist."""
    missing = [
        f"{request_id}[{index}]"
        for request_id, indices in plan.items()
        if request_id in completed
        for index in sorted(resolve_capture(indices, len(completed[request_id].token_ids)))
        if (request_id, index) not in captured
    ]
    unknown = [
        f"{request_id}[{index}]"
        for request_id, index in captured
        if request_id not in completed or not 0 <= index < len(completed[request_id].token_ids)
    ]
    found = [
        ("missing_captured_rows", missing, "captured rows were asked for and not handed over"),
        ("unknown_captured_rows", unknown, "captured rows belong to no output token of the run"),
    ]
    return [Reason(code, f"{len(places)} {what}: {_names(places)}") for code, places, what in found if places]


def _order(
    completed: Mapping[str, ScoredRequest],
    captured: Mapping[tuple[str, int], np.ndarray],
    strange: Collection[str],
    *,
    with_rest: bool,
    seed: int,
) -> list[ScoredRequest]:
    """Requests in the order in which to score them: a random order, those with captured rows first.

    NOTE: requests with ids outside the vocabulary or without any token cannot be scored; they are a reason already.
    """
    ids = sorted(i for i, r in completed.items() if i not in strange and r.prompt_token_ids and r.token_ids)
    shuffled = [ids[i] for i in np.random.default_rng(seed).permutation(len(ids))]
    with_rows = {request_id for request_id, _ in captured}
    first = [i for i in shuffled if i in with_rows]
    rest = [i for i in shuffled if i not in with_rows] if with_rest else []
    return [completed[i] for i in first + rest]


def _noise_floor(reference: ScoringReference, done: Sequence[ScoredRequest]) -> NoiseFloor | None:
    """The reference against itself, on scored requests of middle length."""
    samples = noise_samples([(r.prompt_token_ids, r.token_ids) for r in done])
    return reference.noise_floor(samples) if samples else None


def _classify(num_tokens: int, divergences: Sequence[Divergence], bound: float) -> GreedyCheck:
    """Mark the ties; what no margin explains comes first."""
    marked = [replace(d, tie=bool(d.margin <= bound)) for d in divergences]
    return GreedyCheck(num_tokens, tuple(sorted(marked, key=lambda d: (d.tie, -d.margin))), bound)


def _greedy_reasons(greedy: GreedyCheck) -> list[Reason]:
    if not greedy.unexplained:
        return []
    first = greedy.divergences[0]
    return [
        Reason(
            "not_greedy",
            f"{greedy.unexplained} of {greedy.tokens} output tokens are not the reference's choice, nor ties within "
            f"{greedy.tie_bound:.3g}; request {first.request_id} token {first.output_index} is {first.ours} where the "
            f"reference has {first.theirs} by {first.margin:.3g}",
        )
    ]


def _names(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _NAMED
    return ", ".join(listed[:_NAMED]) + (f" and {more} more" if more > 0 else "")
