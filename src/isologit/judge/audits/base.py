"""What an audit is: which extra runs it wants, what it needs of an entry, and what the evidence says.

One file each in this folder. An audit sees evidence and the judge's own reference, never an entry's process: what it
says can be said again offline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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

    perturbed: the reference with the perturbed weights, by the run's id. perturbed runs are scored by it alone.
    """

    profile: Profile
    spec: EntrySpec
    runs: Sequence[RunEvidence]
    reference: ScoringModel
    perturbed: Mapping[str, ScoringModel] = field(default_factory=dict)

    def of(self, kind: RunKind) -> list[RunEvidence]:
        """Runs of one kind, in the order in which they ran."""
        return [run for run in self.runs if run.kind == kind]

    def reference_of(self, run: RunEvidence) -> ScoringModel:
        """The model that a run's answers must be those of."""
        return self.perturbed.get(run.run_id, self.reference)

    def answers(self, run: RunEvidence) -> Iterator[RequestEvidence]:
        """Every completed request of a run that has tokens."""
        return (record for record in run.records if record.status == "completed" and record.token_ids)


def seconds_per_token(run: RunEvidence) -> float | None:
    """Duration over output tokens; None where the run has none. Lengths of the runs compared must be alike."""
    tokens = sum(len(record.token_ids) for record in run.records)
    return run.duration_s / tokens if run.duration_s is not None and tokens else None


class Audit(Protocol):
    """name: as in a profile's list. title: what it makes sure of, in a few words. runs: kinds beside the timed ones."""

    name: str
    title: str
    runs: tuple[RunKind, ...]

    def verify(self, case: Case) -> list[Finding]:
        """What is wrong; nothing when all is well."""
        ...
