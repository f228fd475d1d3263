"""A request's text, made token by token, is what the definition gives on the whole text; each token costs the same."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isologit.engine.output_text import OutputText
from isologit.engine.request import SamplingParams
from isologit.text.detokenizer import Detokenizer
from isologit.text.tokenizer import Tokenizer, load_tokenizer
from isologit.workload import demo_model_path


def _demo_tokenizer() -> Tokenizer:
    tokenizer = load_tokenizer(demo_model_path())
    assert tokenizer is not None
    return tokenizer


TOKENIZER = _demo_tokenizer()
SPECIAL = sorted(TOKENIZER.special_token_ids)
NAMES = [TOKENIZER.token_name(i) for i in SPECIAL]


def stopping(*stops: str, min_tokens: int = 0, include: bool = False) -> SamplingParams:
    return SamplingParams(max_tokens=10**6, stop=stops, min_tokens=min_tokens, include_stop_str_in_output=include)


def definition(ids: list[int], params: SamplingParams) -> tuple[int, str | None, str, list[str]]:
    """Tokens taken, stop string, text, and texts of the tokens, by looking at everything again after each token.

    A stop string counts if it ends in what a token after the first `min_tokens` adds; of several the one that begins
    first, then the one listed first. Special tokens take part with their names, and are not text.
    """
    detokenizer = Detokenizer(TOKENIZER)
    texts: list[str] = []
    searched, is_text = "", []

    def stop_after(before: int) -> tuple[int, int, str] | None:
        found = [
            (begin, number, stop)
            for number, stop in enumerate(params.stop)
            for begin in range(len(searched))
            if searched.startswith(stop, begin) and begin + len(stop) > before
        ]
        if not found or len(texts) <= params.min_tokens:
            return None
        begin, _, stop = min(found)
        return begin, begin + len(stop), stop

    def cut_at(place: int) -> str:
        return "".join(texts)[: sum(is_text[:place])]

    for count, token_id in enumerate(ids, 1):
        before = len(searched)
        texts.append(detokenizer.push(token_id))
        name = TOKENIZER.token_name(token_id) if token_id in SPECIAL else ""
        searched += texts[-1] + name
        is_text += [True] * len(texts[-1]) + [False] * len(name)
        match = stop_after(before)
        rest = detokenizer.finish() if match is None and count == len(ids) else ""
        if rest:
            before = len(searched)
            texts[-1] += rest
            searched += rest
            is_text += [True] * len(rest)
            match = stop_after(before)
        if match is not None:
            return count, match[2], cut_at(match[1] if params.include_stop_str_in_output else match[0]), texts
    return len(ids), None, "".join(texts), texts


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    ids=st.lists(
        st.one_of(
            st.integers(0, TOKENIZER.vocab_size - 1),
            st.sampled_from([*SPECIAL, *TOKENIZER.encode_without_bos("abc cab e\n ee é 🙂")]),
        ),
        max_size=40,
    ),
    stops=st.lists(
        st.lists(st.sampled_from([*"abce \n", "\ufffd", "é", *NAMES]), min_size=1, max_size=3).map("".join), max_size=4
    ),
    min_tokens=st.integers(0, 6),
    include=st.booleans(),
)
def test_it_is_what_the_definition_gives_on_the_whole_text(
    ids: list[int], stops: list[str], min_tokens: int, include: bool
) -> None:
    params = stopping(*stops, min_tokens=min_tokens, include=include)
    count, stop, wanted, wanted_texts = definition(ids, params)
    text, shown, taken = OutputText(TOKENIZER, params), "", 0
    for token_id in ids:
        taken += 1
        is_over = text.push(token_id)
        shown += text.show()
        assert wanted.startswith(shown), "what was shown stays"
        if is_over:
            break
    whole = text.finish(ids[:taken])
    shown += text.show()
    assert (taken, text.stop, whole, shown) == (count, stop, wanted, wanted)
    if ids:
        assert text.token_texts == wanted_texts
        assert "".join(text.token_texts).startswith(whole) or include
    if stop is None:
        assert whole == TOKENIZER.decode(ids) == OutputText(TOKENIZER, params).finish(ids)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    text = OutputText(TOKENIZER, stopping("fox jumps far away"))
    shown = []
    for token_id in TOKENIZER.encode_without_bos("a fast fox jumped"):
        text.push(token_id)
        shown.append(text.show())
    assert "".join(shown) == "a fast fox jumped"
    assert "".join(shown[:4]), "nothing is held back for its length alone"


def test_tokens_keep_their_own_text_when_a_stop_string_cuts_it() -> None:
    ids = TOKENIZER.encode_without_bos("the fox runs")
    free, stopped = OutputText(TOKENIZER, stopping()), OutputText(TOKENIZER, stopping("x r"))
    for token_id in ids:
        free.push(token_id)
        if not stopped.stop:
            stopped.push(token_id)
    assert stopped.finish(ids) == "the fo"
    assert stopped.token_texts == free.token_texts[: len(stopped.token_texts)]


def test_a_stop_token_is_left_out_of_the_text_unless_asked_for() -> None:
    ids = TOKENIZER.encode_without_bos("the fox runs")
    last = TOKENIZER.inner_text(ids[-1:])
    for params, wanted in ((stopping(), "the fox runs".removesuffix(last)), (stopping(include=True), "the fox runs")):
        pushed = OutputText(TOKENIZER, params)
        for token_id in ids:
            pushed.push(token_id)
        assert pushed.finish(ids, by_stop_token=True) == wanted
        assert OutputText(TOKENIZER, params).finish(ids, by_stop_token=True) == wanted


def test_a_special_tokens_name_ends_the_output_alone_and_within_a_longer_string() -> None:
    ids = [*TOKENIZER.encode_without_bos("ab"), SPECIAL[-1], *TOKENIZER.encode_without_bos("c")]
    name = TOKENIZER.token_name(SPECIAL[-1])
    for stop in (name, f"b{name}", f"{name}{TOKENIZER.inner_text(ids[-1:])}"):
        text = OutputText(TOKENIZER, stopping(stop))
        hits = [text.push(token_id) for token_id in ids]
        assert hits.count(True) == 1, stop
        assert text.finish(ids) == ("a" if stop.startswith("b") else "ab")


@pytest.mark.parametrize("count", [500, 4000])
def test_each_token_decodes_as_much_as_any_other(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0
    plain = TOKENIZER._decode

    def counted(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return plain(ids)

    monkeypatch.setattr(TOKENIZER, "_decode", counted)
    text = OutputText(TOKENIZER, stopping("never to be seen", "x" * 1000))
    ids = (TOKENIZER.encode_without_bos("the fox ran over the hill é 🙂 ") * count)[:count]
    for token_id in ids:
        assert not text.push(token_id)
        text.show()
    assert decoded <= 3 * count
