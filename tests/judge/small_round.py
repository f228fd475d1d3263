"""A round that takes seconds: the two bundled entries, few prompts, and only the audits that need no other runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from isologit.judge.entry import Entry
from isologit.judge.examples import example_entries
from isologit.judge.profile import Limits, Load, Profile, Prompts
from isologit.judge.round import Judge
from isologit.judge.sandbox import sandbox_problem
from isologit.judge.seeds import RoundSeed

AUDITS = ("conservation", "stream", "endings", "rescoring", "fingerprint", "commitment", "left_behind", "attempts")
PROFILE = Profile(
    name="small",
    title="A small round",
    prompts=Prompts(count=4),
    load=Load(warm_up=1),
    limits=Limits(start_s=60, request_s=60, run_s=120, stop_s=2),
    repeats=1,
    reveal_rows=8,
    canary_drift=100.0,  # other tests keep the machine busy
    audits=AUDITS,
)
SEED = RoundSeed(bytes(range(32)))


def practice() -> bool:
    """Without a sandbox these tests still have something to say."""
    return sandbox_problem() is not None


def two_entries() -> list[Entry]:
    """An honest one and a cheat, both of which start at once."""
    return [entry for entry in example_entries() if entry.folder.name in ("numpy", "int8")]


def begin(folder: Path, entries: list[Entry] | None = None, profile: Profile = PROFILE) -> str:
    return Judge(folder).begin(entries or two_entries(), profile, practice=practice(), seed=SEED)


@pytest.fixture(scope="session")
def finished_round(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(the judge's folder, the round's id). Whoever changes it works on a copy."""
    folder = tmp_path_factory.mktemp("judge")
    round_id = begin(folder)
    Judge(folder).run(round_id)
    return folder, round_id
