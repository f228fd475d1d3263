"""Whether what a server streamed is a whole answer to its request. Knows no dialect, no clock and no verdict."""

from __future__ import annotations

from isologit.bench.dialects import ENDED_AT_THE_LIMIT
from isologit.bench.records import RequestRecord


def problem_with(record: RequestRecord, *, ignore_eos: bool) -> str | None:
    """Why an answer whose stream ended well does not count, or None.

    An answer without any token counts only where the server says that the model itself stopped at once. With
    `ignore_eos` exactly `max_new_tokens` tokens are due: by the server's count, or by its word that the limit ended it.
    """
    counted, wanted = record.reported_tokens, record.request.max_new_tokens
    if not record.token_times_s:
        if record.finish_reason in (None, ENDED_AT_THE_LIMIT):
            return "the answer holds no token"
        if counted is not None and counted > 1:  # one may be the end-of-sequence token
            return f"the server counts {counted} output tokens and streamed none"
    if not ignore_eos:
        return None
    if counted is not None:
        return None if counted == wanted else f"{counted} of {wanted} tokens, though --ignore-eos asks for all of them"
    if record.finish_reason != ENDED_AT_THE_LIMIT:
        return f"nothing says that all {wanted} tokens came, which --ignore-eos asks for"
    return None
