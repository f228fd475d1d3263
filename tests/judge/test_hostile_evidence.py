"""What an entry sends or is called can cost it its own place, never another's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isologit.errors import UserError
from isologit.judge.audits import AUDITS, Case
from isologit.judge.audits.logprobs import _not_among
from isologit.judge.entry import Entry, EntryError, EntrySpec
from isologit.judge.evidence import ProcessFacts, RequestEvidence, RunEvidence, RunKind
from isologit.judge.pages import _words
from isologit.judge.profile import Load, Profile, Prompts
from isologit.judge.prompts import draw_prompts
from isologit.judge.round import Judge, run_kinds
from isologit.judge.seeds import RoundSeed
from isologit.judge.verdict import judge_case
from isologit.judge.verify import missing_runs
from isologit.judge.wire import Answer, WireError, _add_tokens
from isologit.text.tokenizer import load_tokenizer
from isologit.workload import demo_model_path

SEED = RoundSeed(bytes(range(32)))
KINDS: tuple[RunKind, ...] = ("timed", "held-out", "twins", "probed", "perturbed")


class Unreadable:
    """A reference that cannot make sense of what it is given."""

    vocab_size, hidden_size, num_parameters, eos_token_ids = 100, 4, 1, (2,)

    def hidden(self, prompt: str, token_ids: list[int]) -> np.ndarray:
        raise IndexError("row 7")


def a_run(token_ids: list[int], *, void: bool = False) -> RunEvidence:
    record = RequestEvidence("r", "prompt", 2, "", 0.0, token_ids=token_ids, status="completed")
    facts = ProcessFacts(started=True)
    run = RunEvidence("round", "run", "timed", "e", "0", 1, "00", False, "openai", facts, duration_s=1.0, void=void)
    return replace(run, records=[record])


def a_case(runs: list[RunEvidence], *audits: str) -> Case:
    profile = Profile(name="p", title="p", audits=audits)
    return Case(profile, EntrySpec(name="e", command=("x",)), runs, Unreadable())  # type: ignore[arg-type]


def test_evidence_that_stops_an_audit_is_a_finding() -> None:
    verdict = judge_case(a_case([a_run([3, 4])], "rescoring", "endings"))
    assert verdict.status == "INVALID"
    assert [finding.code for finding in verdict.findings] == ["rescoring.error"]
    assert verdict.audits == {"rescoring": "failed", "endings": "passed"}


@pytest.mark.parametrize("token", [-1, 100, 1 << 62, 10**19])
def test_ids_outside_the_vocabulary_are_named_and_never_looked_up(token: int) -> None:
    case = a_case([a_run([token, 2])])
    assert [finding.code for finding in AUDITS["rescoring"].verify(case)] == ["rescoring.not_greedy"]
    assert not list(case.answers(case.runs[0]))


def test_a_voided_run_has_no_time_but_is_judged() -> None:
    case = a_case([a_run([200, 2], void=True)])
    assert not case.of("timed")
    assert AUDITS["rescoring"].verify(case)


def test_commitments_come_with_their_own_tokens() -> None:
    with pytest.raises(WireError, match="commits to its own"):
        _add_tokens({"commit": [{}, {}]}, [5], Answer())


@pytest.mark.parametrize(
    ("given", "absent", "strange"),
    [
        ([-1.0, -2.0, -3.0], 0, None),
        ([-1.0, -3.0], 1, None),  # two tokens of the same text
        ([-1.0, -3.0], 0, -3.0),
        ([-1.0, -2.5, -3.0], 0, -2.5),
        ([-1.0, -1.0], 0, -1.0),
        ([float("nan")], 0, float("nan")),
    ],
)
def test_log_probabilities_are_the_references_in_order(given: list[float], absent: int, strange: float | None) -> None:
    found = _not_among(given, [-1.0, -2.0, -3.0, -4.0], 0.01, absent)
    assert repr(found) == repr(strange)


def test_no_run_tells_by_numbers_or_ids_what_it_is_for() -> None:
    profile = Profile(name="p", title="p", prompts=Prompts(count=24), load=Load(warm_up=2))
    tokenizer = load_tokenizer(demo_model_path())
    assert tokenizer is not None
    prompts = draw_prompts(profile, SEED, tokenizer)
    runs = {kind: prompts.of(kind, SEED, f"{kind}/0/1/e") for kind in KINDS}
    assert {len(requests) for requests in runs.values()} == {24}
    ids = [name for requests in runs.values() for name, _, _ in requests]
    warm = prompts.of_warm_up(SEED, "timed/0/1/e")
    ids += [name for name, _, _ in warm]
    assert len(set(ids)) == len(ids)
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in ids)
    sent = {prompt for requests in runs.values() for _, prompt, _ in requests}
    assert not sent & {prompt for _, prompt, _ in warm}
    assert sorted(limit for _, _, limit in runs["held-out"]) == sorted(limit for _, _, limit in runs["timed"])


def test_every_check_is_against_the_timed_runs() -> None:
    assert set(run_kinds(Profile(name="p", title="p", repeats=6)).items()) == {
        ("timed", 6), *((kind, 2) for kind in KINDS[1:])
    }  # fmt: skip


def test_a_pack_without_one_of_its_runs_is_not_whole() -> None:
    profile = Profile(name="p", title="p", repeats=2, audits=("rescoring",))
    runs = [{"entry": "e", "kind": "timed", "repeat": i, "state": "done"} for i in range(2)]
    assert not missing_runs(profile, "E", runs, "e")
    assert len(missing_runs(profile, "E", runs[:1], "e")) == 1
    assert len(missing_runs(profile, "E", [*runs, runs[0]], "e")) == 1


def an_entry(folder: Path, name: str) -> Entry:
    folder.mkdir()
    (folder / "entry.yaml").write_text(f"name: {name}\ncommand: [x]\n", encoding="utf-8")
    return Entry(folder)


def test_names_that_look_alike_are_refused(tmp_path: Path) -> None:
    entries = [
        an_entry(tmp_path / "a", "Plain numpy"),
        an_entry(tmp_path / "b", "PLAIN  \N{FULLWIDTH LATIN SMALL LETTER N}umpy"),
    ]
    with pytest.raises(UserError, match="look alike"):
        Judge(tmp_path / "judge").begin(entries, Profile(name="p", title="p"), practice=True)
    with pytest.raises(EntryError, match="alphabets"):
        an_entry(tmp_path / "c", "Plain num\N{CYRILLIC SMALL LETTER ER}y")
    assert an_entry(tmp_path / "d", "快速 engine").name


def test_a_report_in_markdown_holds_words_only() -> None:
    said = _words("<img src=x> [a](http://b) `c` *d* | # e\x1b[2J")
    assert said == r"\<img src=x\> \[a\](http\://b) \`c\` \*d\* \| \# e \[2J"


def test_code_cannot_hide_where_the_hash_does_not_look(tmp_path: Path) -> None:
    folder = tmp_path / "__pycache__"
    entry = an_entry(folder, "e")
    before = entry.sha256()
    (folder / "server.py").write_text("x")
    assert entry.sha256() != before
