"""From evidence to a verdict: the same function for a fresh round, an old one judged again, and a pack offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from isologit.judge.audits import Case, Finding, audits_of
from isologit.judge.statistics import clean_rows_bound

Status = Literal["VALID", "INVALID"]
PASSED, FAILED = "passed", "failed"


@dataclass(frozen=True)
class EntryVerdict:
    """status: INVALID when there is a finding. audits: `passed`, `failed`, or why one says nothing. figures: what the
    checks saw and what they leave open."""

    status: Status
    findings: tuple[Finding, ...]
    audits: dict[str, str]
    figures: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON."""
        return {**asdict(self), "findings": [asdict(finding) for finding in self.findings]}


def judge_case(case: Case) -> EntryVerdict:
    """Every audit of the profile over all runs of one entry."""
    findings: list[Finding] = []
    outcome: dict[str, str] = {}
    for audit in audits_of(case.profile):
        silent = _silent(case, audit.name, audit.runs)
        if silent is not None:
            outcome[audit.name] = silent
            continue
        try:
            found = audit.verify(case)
        except Exception as error:  # NOTE: what one entry sends must not keep the others from being judged
            said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            found = [Finding(f"{audit.name}.error", f"its evidence cannot be judged: {said}")]
        findings += found
        outcome[audit.name] = FAILED if found else PASSED
    return EntryVerdict("INVALID" if findings else "VALID", tuple(findings), outcome, _figures(case))


def _silent(case: Case, name: str, kinds: Sequence[str]) -> str | None:
    """Why an audit says nothing about this case, or None."""
    if name in ("fingerprint", "commitment", "nonce") and not case.spec.commit:
        return "not applicable: the entry does not commit to its rows"
    if name == "logprobs" and case.spec.commit:
        return "not applicable: the entry commits to whole rows"
    if name == "mounts" and all(run.process.sandbox == "none" for run in case.runs):
        return "not applicable: no sandbox"
    missing = [kind for kind in kinds if not any(run.kind == kind for run in case.runs)]
    return f"not applicable: no {missing[0]} run" if missing else None


def _figures(case: Case) -> dict[str, Any]:
    """Counts, times, and the bounds that the checks leave."""
    tokens = sum(len(r.token_ids) for run in case.runs for r in case.answers(run))
    revealed = sum(len(run.revealed) for run in case.runs)
    times = [run.duration_s for run in case.of("timed") if run.duration_s is not None]
    return {
        "tokens_rescored": tokens,
        "tokens_fingerprinted": sum(len(r.fingerprints) for run in case.runs for r in case.answers(run)),
        "rows_revealed": revealed,
        "bad_rows_at_most": clean_rows_bound(revealed),
        "timed_runs": len(times),
        "median_s": median(times) if times else None,
        "times_s": times,
        "open": _open(case),
    }


def _open(case: Case) -> list[str]:
    """What these checks cannot see, in words."""
    said = []
    if not case.spec.commit:
        said.append(
            "The entry does not commit to its rows: of each row only the most likely tokens were compared, nothing of "
            "the rest, and what was streamed could have been computed with other arithmetic than what was timed."
        )
    if all(run.process.sandbox == "none" for run in case.runs):
        said.append("There was no sandbox: files, network and other processes were in the entry's reach. NOT RANKED.")
    return said
