"""Token ids and text say the same, by the judge's own tokenizer."""

from __future__ import annotations

from isologit.judge.audits.base import Case, Finding
from isologit.judge.evidence import RunKind

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class IdsText:
    """A right text beside wrong ids, or the other way round, is two answers."""

    name = "ids_text"
    title = "token ids are those of the text"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """The first request of a run whose text is not that of its ids; an unfinished character may be missing."""
        found = []
        for run in case.runs:
            reference = case.reference_of(run)
            for record in case.answers(run):
                wanted = reference.text_of(record.token_ids)
                if record.text.rstrip(_UNFINISHED) != wanted.rstrip(_UNFINISHED):
                    message = f"request {record.id}: its text is not that of its token ids"
                    found.append(Finding("ids_text.differ", message, run.run_id, record.id))
                    break
        return found


AUDIT = IdsText()
