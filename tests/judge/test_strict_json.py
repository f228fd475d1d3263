"""What lenient readers take and a judge must not."""

from __future__ import annotations

import pytest

from isologit.judge.strict_json import loads


@pytest.mark.parametrize(
    "text",
    [
        "NaN", "[Infinity]", '{"a": -Infinity}', '{"logprob": 1e999}', "[-1e400]", '{"a": 1, "a": 2}',
        '{"x": {"b": 1, "b": 1}}', "[" * 100_000, "1" * 5000, "{'a': 1}", "[1,]", "", "01", "\ufeff[]",
    ],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # the reasons differ, the type is the contract
        loads(text)


def test_plain_values_pass() -> None:
    assert loads('{"a": [1, -2.5, 1e300, true, null, "é"]}') == {"a": [1, -2.5, 1e300, True, None, "é"]}
