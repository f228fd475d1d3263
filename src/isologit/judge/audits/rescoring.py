"""Every output token is the reference's own choice, or as good as tied with it."""

from __future__ import annotations

import numpy as np

from isologit.judge.audits.base import Case, Finding
from isologit.judge.evidence import RunEvidence, RunKind


def not_greedy(case: Case, run: RunEvidence) -> Finding | None:
    """Tokens of a run that are not the reference's argmax, nor ties.

    The reference sees the entry's tokens (teacher forcing) and says which it would have chosen at each place. A token
    is a tie when the reference's margin is at most twice the tolerance: each of the two logits may be off by it.
    """
    reference = case.reference_of(run)
    wrong, total = 0, 0
    first: tuple[str, int, str] | None = None
    for record in case.completed(run):
        total += len(record.token_ids)
        strange = [i for i, token in enumerate(record.token_ids) if not 0 <= token < reference.vocab_size]
        if strange:
            wrong += len(strange)
            first = first or (record.id, strange[0], "its id is not in the vocabulary")
            continue
        tokens = np.asarray(record.token_ids, np.int64)
        logits = reference.logits(reference.hidden(record.prompt, record.token_ids))
        margins = logits.max(axis=1) - logits[np.arange(len(tokens)), tokens]
        over = np.flatnonzero(margins > 2 * case.profile.tolerance)
        wrong += len(over)
        if len(over) and first is None:
            first = (record.id, int(over[0]), f"the reference prefers another by {margins[over[0]]:.3g}")
    if first is None:
        return None
    name, index, why = first
    message = f"{wrong} of {total} tokens are not the model's own (greedy) choice; request {name} token {index}: {why}"
    return Finding("rescoring.not_greedy", message, run.run_id, name, index)


class Rescoring:
    """Of every run."""

    name = "rescoring"
    title = "every token is the greedy choice"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """The first wrong token of each run, with the number of them."""
        return [finding for run in case.runs if (finding := not_greedy(case, run)) is not None]


AUDIT = Rescoring()
