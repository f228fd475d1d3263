"""What an audit is: which extra runs it wants, what it needs of an entry, and what the evidence says.

One file each in this folder. An audit sees evidence and the judge's own reference, never an entry's process: what it
says can be said again offline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from isologit.judge.entry import EntrySpec
from isologit.judge.evidence import RequestEvidence, RunEvidence, RunKind
from isologit.judge.profile import Profile
from isologit.judge.reference import ScoringModel


@dataclass(frozen=True)
class Finding:
    """Why an entry is INVALID. code: for machines, the audit's name first. message: one sentence for people. run,
    request, index: where the evidence is."""

    code: str
    message: str
    run: str | None = None
    request: str | None = None
    index: int | None = None


@dataclass(frozen=True)
class Case:
    """All runs of one entry in one round, and what they are judged by.

    runs: voided ones as well, so that nothing in them is forgotten. perturbed: the reference with the perturbed
    weights, by the run's id. perturbed runs are scored by it alone.
    """

    profile: Profile
    spec: EntrySpec
    runs: Sequence[RunEvidence]
    reference: ScoringModel
    perturbed: Mapping[str, ScoringModel] = field(default_factory=dict)

    def of(self, kind: RunKind) -> list[RunEvidence]:
        """Runs of one kind whose times count, in the order in which they ran."""
        return [run for run in self.runs if run.kind == kind and not run.void]

    def reference_of(self, run: RunEvidence) -> ScoringModel:
        """The model that a run's answers must be those of."""
        return self.perturbed.get(run.run_id, self.reference)

    def completed(self, run: RunEvidence) -> Iterator[RequestEvidence]:
        """Every completed request of a run that has tokens."""
        return (record for record in run.records if record.status == "completed" and record.token_ids)

    def answers(self, run: RunEvidence) -> Iterator[RequestEvidence]:
        """Those of them that a model can read: all ids are in the vocabulary. `rescoring` names the others."""
        size = self.reference.vocab_size
        return (r for r in self.completed(run) if min(r.token_ids) >= 0 and max(r.token_ids) < size)

    def num_tokens(self, run: RunEvidence) -> tuple[int, int]:
        """Tokens of the prompts that were answered, and of the answers."""
        answered = [record for record in run.records if record.token_ids]
        prompts = sum(len(self.reference.prompt_ids(record.prompt)) for record in answered)
        return prompts, sum(len(record.token_ids) for record in answered)


def time_ratio(
    case: Case, ours: Sequence[RunEvidence], theirs: Sequence[RunEvidence], toward: Callable[..., float]
) -> float | None:
    """Time per token, of prompts and answers, of some runs over that of others; None where either has none.

    Prompts count because other prompts get other answers: where these are shorter, prompts are more of the work.
    Of what varies, that which speaks for the entry is taken. `toward` min: the fastest of ours over their median, by
    the clock or by processor time, whichever is less; max: the slowest, whichever is more. Other programs on the
    machine slow a run or two, and one clock more than the other; what an entry does is in all runs and in both.
    """
    ratios = []
    for seconds in (_clock, _processor):
        first = [value for run in ours if (value := _per_token(case, run, seconds(run))) is not None]
        second = [value for run in theirs if (value := _per_token(case, run, seconds(run))) is not None]
        if first and second:
            ratios.append(toward(first) / median(second))
    return toward(ratios) if ratios else None


def _clock(run: RunEvidence) -> float | None:
    return run.duration_s


def _processor(run: RunEvidence) -> float | None:
    return run.process.run_cpu_s


def _per_token(case: Case, run: RunEvidence, seconds: float | None) -> float | None:
    prompts, outputs = case.num_tokens(run)
    return seconds / (prompts + outputs) if seconds and outputs else None


class Audit(Protocol):
    """name: as in a profile's list. title: what it makes sure of, in a few words. runs: kinds beside the timed ones."""

    name: str
    title: str
    runs: tuple[RunKind, ...]

    def verify(self, case: Case) -> list[Finding]:
        """What is wrong; nothing when all is well."""
        ...
