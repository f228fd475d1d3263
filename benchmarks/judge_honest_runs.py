"""How often the judge accuses the honest, and how soon it finds eight bits: counted over many short sandboxed runs.

    python -m benchmarks.judge_honest_runs --runs 300 --minutes 60

Honest entries take turns: our server with several numbers of slots, with and without speculation and prefix reuse, and
the bundled numpy entry. A group of runs is what one entry has in a round, and every audit judges it. Then two entries
that round weights, and keys and values, to eight bits are run until their fingerprints give them away.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import isologit
import isologit.judge
from isologit.common.environment import describe_environment
from isologit.common.files import write_json
from isologit.judge.audits.base import Case
from isologit.judge.audits.fingerprint import MEAN_FACTOR, TOKEN_FACTOR, expected_differences
from isologit.judge.build import build_entry
from isologit.judge.canary import canary_seconds, peak_flop_per_s
from isologit.judge.entry import ENTRY_FILE, Entry
from isologit.judge.evidence import RunEvidence, RunKind
from isologit.judge.perturb import perturbed_model
from isologit.judge.profile import Limits, Load, Profile, Prompts
from isologit.judge.prompts import RoundPrompts, draw_prompts
from isologit.judge.reference import JudgeReference
from isologit.judge.run import RunSpec, perform_run
from isologit.judge.seeds import RoundSeed
from isologit.judge.statistics import accusation_bound, clean_rows_bound
from isologit.judge.verdict import judge_case
from isologit.text.tokenizer import load_tokenizer
from isologit.workload import demo_model_path

_RESULT = Path(__file__).parent / "results" / "judge-honest-runs.json"
_EXAMPLES = Path(isologit.judge.__file__).parent / "examples"
_NUMPY = _EXAMPLES / "numpy"
_KINDS: tuple[RunKind, ...] = ("timed", "held-out", "twins", "probed", "perturbed") * 2
_LEAST_TOKENS = 200  # for an average
_PROFILE = Profile(
    name="honest",
    title="Honest runs",
    prompts=Prompts(count=16),
    load=Load(warm_up=1),
    limits=Limits(start_s=300, request_s=300, run_s=300, stop_s=10, memory_gib=4),
    reveal_rows=32,
)
_ROUNDED = {
    "weights": "def prepare(self):\n"
    "        for name, weight in self.weights.items():\n"
    "            self.weights[name] = rounded(weight) if weight.ndim == 2 else weight\n",
    "keys and values": "def remember(self, cache, layer, k, v):\n"
    "        return super().remember(cache, layer, rounded(k), rounded(v))\n",
}


def main() -> None:
    """Count and write the result after every group, so that an end at any time loses nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=_RESULT)
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    result: dict[str, Any] = {
        "seed": args.seed, "environment": describe_environment(), "load_average_at_start": os.getloadavg(),
        "honest": {"runs": 0, "groups": 0, "tokens": 0, "revealed_rows": 0, "accusations": []},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        judge = _Judge(Path(name), args.seed)
        result["found"] = {what: judge.tokens_until_found(what, method) for what, method in _ROUNDED.items()}
        write_json(args.out, result)
        honest = result["honest"]
        for variant in itertools.cycle(_variants()):
            if honest["runs"] >= args.runs or time.monotonic() > deadline:
                break
            case = judge.group(judge.entry(variant))
            verdict = judge_case(case)
            honest["runs"] += len(case.runs)
            honest["groups"] += 1
            honest["tokens"] += verdict.figures["tokens_rescored"]
            honest["revealed_rows"] += verdict.figures["rows_revealed"]
            honest["accusations"] += [{"entry": variant, **finding} for finding in verdict.to_dict()["findings"]]
            honest["accused_runs"] = len({(f["entry"], f["run"]) for f in honest["accusations"]})
            honest["accusations_by_audit"] = dict(Counter(f["code"] for f in honest["accusations"]))
            honest["rate_below_at_95_percent"] = None if honest["accusations"] else accusation_bound(honest["runs"])
            honest["bad_rows_below_at_95_percent"] = clean_rows_bound(honest["revealed_rows"])
            write_json(args.out, result)
            print(f"{variant}: {verdict.status}, {honest['runs']} runs, {honest['tokens']} tokens", flush=True)


def _variants() -> list[str]:
    """Options of our server, and the other honest entry."""
    combined = itertools.product((1, 4, 16), (0, 4), ("", "no-"))
    ours = [
        f"--max-num-seqs {slots} --speculative-tokens {drafts} --{no}enable-prefix-caching"
        for slots, drafts, no in combined
    ]
    return [name for pair in zip(ours, itertools.repeat("numpy"), strict=False) for name in pair]


class _Judge:
    """The judge's side: prompts of a seed of their own for each group, and one reference."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed, self._groups = folder, seed, 0
        self._reference = JudgeReference(demo_model_path())

    def entry(self, variant: str) -> Entry:
        """An entry's folder; our server's is the bundled one with more options, and the package of this process."""
        folder = self._new_folder()
        if variant == "numpy":
            shutil.copytree(_NUMPY, folder)
            return Entry(folder)
        folder.mkdir()
        about = yaml.safe_load((_EXAMPLES / "isologit" / ENTRY_FILE).read_text())
        package = f"export PYTHONPATH={Path(isologit.__file__).parent.parent};"
        about["name"] = variant
        about["build"][-1] = f"{package} {about['build'][-1]}"
        about["command"][-1] = f"{package} {about['command'][-1].strip()} {variant}"
        (folder / ENTRY_FILE).write_text(json.dumps(about))
        return Entry(folder)

    def group(self, entry: Entry, kinds: tuple[RunKind, ...] = _KINDS) -> Case:
        """The runs that an entry has in a round."""
        seed, prompts = self._draw()
        changed = self._new_folder()
        perturbed_model(demo_model_path(), changed, seed.generator("perturbed", 0))
        other = JudgeReference(changed)
        # NOTE: what our server's variants build is the same for all of them.
        built = build_entry(entry, demo_model_path(), _PROFILE.limits, self._folder / "build", practice=False)
        runs: list[RunEvidence] = []
        for place, kind in enumerate(kinds):
            spec = RunSpec("r", f"{self._groups}-{kind}-{place}", kind, place, 1, entry.sha256())
            model = changed if kind == "perturbed" else demo_model_path()
            work = self._new_folder()
            work.mkdir()
            before = canary_seconds()
            run, _ = perform_run(spec, entry, _PROFILE, prompts, model, seed, work, practice=False, build=built)
            run.canary_s, run.peak_flop_per_s = (before, canary_seconds()), peak_flop_per_s()
            runs.append(run)
        perturbed = {run.run_id: other for run in runs if run.kind == "perturbed"}
        return Case(_PROFILE, entry.spec, runs, self._reference, perturbed)

    def tokens_until_found(self, what: str, method: str) -> dict[str, Any]:
        """How many tokens of a cheat, in the order in which they came, until a fingerprint or their average speaks."""
        folder = self._new_folder()
        shutil.copytree(_NUMPY, folder)
        (folder / "cheat.py").write_text(
            "import numpy as np\n\nimport server\n\n\n"
            "def rounded(x):\n"
            "    scale = np.abs(x).max(axis=-1, keepdims=True) / 127 + 1e-12\n"
            "    return (np.round(x / scale) * scale).astype(np.float32)\n\n\n"
            f"class Model(server.Llama):\n    {method}\n\n"
            "class Entry(server.Entry):\n    model_class = Model\n\n\nserver.main(Entry)\n"
        )
        file = folder / "entry.yaml"
        file.write_text(file.read_text().replace("server.py", "cheat.py"))
        entry, values = Entry(folder), np.zeros(0)
        found: int | None = None
        while found is None and len(values) < 20_000:
            case = self.group(entry, ("timed",))
            values = np.concatenate([values, *_differences(case)])
            found = _first(values, _PROFILE.tolerance)
        return {"tokens": found, "looked_at": len(values), "what": f"{what} of eight bits"}

    def _draw(self) -> tuple[RoundSeed, RoundPrompts]:
        self._groups += 1
        seed = RoundSeed(np.random.default_rng((self._seed, self._groups)).bytes(32))
        tokenizer = load_tokenizer(demo_model_path())
        assert tokenizer is not None
        drawn = draw_prompts(_PROFILE, seed, tokenizer)
        timed, secret, warm_up = (
            [(name, prompt, min(limit, 48)) for name, prompt, limit in listed]
            for listed in (drawn.timed, drawn.secret, drawn.warm_up)
        )
        return seed, RoundPrompts(timed, secret, warm_up)

    def _new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._folder)) / "in"


def _differences(case: Case) -> Iterator[np.ndarray]:
    """By request, in the order of their ends."""
    for run in case.runs:
        for record in sorted(case.answers(run), key=lambda record: record.finished_s or 0.0):
            yield expected_differences(case, run, record)


def _first(values: np.ndarray, tolerance: float) -> int | None:
    """Tokens until the first that is accused alone or by the average of all so far; None for neither."""
    means = np.sqrt(np.cumsum(values**2) / np.arange(1, len(values) + 1))
    late = np.arange(1, len(values) + 1) >= _LEAST_TOKENS
    accused = (values > TOKEN_FACTOR * tolerance) | (late & (means > MEAN_FACTOR * tolerance))
    return int(accused.argmax()) + 1 if accused.any() else None


if __name__ == "__main__":
    main()
