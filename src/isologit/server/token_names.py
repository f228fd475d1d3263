"""How tokens and their log-probabilities are shown; every token has a name, also one that is no text by itself."""

from __future__ import annotations

from collections.abc import Mapping

from isologit.text.tokenizer import Tokenizer


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    r"""The text of a token where other text stands before it; of a special token what the vocabulary calls it.

    Bytes that are no text by themselves are written as OpenAI writes them: `bytes:\xe2\x82`.
    """
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def shown_logprobs(logprobs: Mapping[int, float], token_id: int, count: int) -> dict[int, float]:
    """The `count` most likely tokens and `token_id`, the likeliest first."""
    best = best_tokens(logprobs, len(logprobs))
    return dict([*best[:count], *((i, value) for i, value in best[count:] if i == token_id)])


def best_tokens(logprobs: Mapping[int, float], count: int) -> list[tuple[int, float]]:
    """The `count` most likely tokens, the likeliest first; the chosen one may be in `logprobs` without being one."""
    return sorted(logprobs.items(), key=lambda item: -item[1])[:count]
