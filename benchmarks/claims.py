"""The project's claims of speed on a CPU beside what was measured: every figure from a result file, with its verdict.

A file says which CPU it is of. Files named avx2 are of a CPU kept to AVX2, or of one that has nothing wider.

    python -m benchmarks.claims          # print the table from benchmarks/results
    python -m benchmarks.claims --run    # measure everything again first (about two hours)

With `--run`, the recorded answers that speculation is measured on are named by `--dataset`, `--replay` and
`--tokenizer`; without them that part keeps its last result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

_ROOT = Path(__file__).parents[1]
_RESULTS = Path(__file__).parent / "results"
_PEER_RUNS = (
    ("trace300",),
    ("trace1500", "--systems", "isologit", "openvino", "vllm"),
    ("tiny64",),
    ("latency",),
    ("long",),
    ("trace300", "--isa", "avx2", "--systems", "isologit", "openvino", "vllm"),
    ("trace1500", "--isa", "avx2", "--systems", "isologit", "openvino", "vllm"),
)
_OURS = "isologit"


@dataclass(frozen=True)
class Claim:
    """What should hold, what was measured, whether it does, and where; `met` is None where nothing was measured."""

    what: str
    measured: str
    met: bool | None
    machine: str = ""


def main() -> None:
    """Print the table, after measuring if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    for name in ("dataset", "replay", "tokenizer"):
        parser.add_argument(f"--{name}", type=Path)
    args = parser.parse_args()
    if args.run:
        for arguments in _PEER_RUNS:
            _python("benchmarks.peers", *arguments)
        paths = {name: getattr(args, name) for name in ("dataset", "replay", "tokenizer")}
        if all(paths.values()):
            _python("benchmarks.speculation", *(part for name, path in paths.items() for part in (f"--{name}", path)))
    print("| claim | measured | holds | machine |\n|---|---|---|---|")
    for claim in claims(_RESULTS):
        holds = "not measured" if claim.met is None else "yes" if claim.met else "**no**"
        print(f"| {claim.what} | {claim.measured} | {holds} | {claim.machine} |")


def _python(module: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], cwd=_ROOT, check=True)


def claims(results: Path) -> Iterator[Claim]:
    """All claims, from the result files in a folder."""
    names = ("trace300", "trace1500", "tiny64", "latency", "long", "trace300-avx2", "trace1500-avx2")
    peers = {name: _read(results / f"peers-{name}.json") for name in names}
    for name, least in (("trace300", 0.65), ("trace1500", 0.75)):
        if not _is_narrow(peers[name]):
            yield _against_best(f"{name}: at most 0.70 of the best peer's time", peers[name], 0.70)
            yield _limit(f"{name}: limit / time at least {least:g}", peers[name], least)
            yield _planned(f"{name}: the planner predicts the time within 10 %", peers[name])
    yield _against_best("tinyllama-1.1b, 64 requests: faster than every peer", peers["tiny64"], 1.0)
    yield _against_best("one request alone: not slower than the fastest peer", peers["latency"], 1.0)
    yield _against_best("2048-token prompts: within 10 % of the fastest peer", peers["long"], 1.10)
    for name, most in (("trace300", 0.78), ("trace1500", 0.80)):
        found = peers[name] if _is_narrow(peers[name]) else peers[f"{name}-avx2"]
        yield _against_best(f"{name}, AVX2: at most {most:.2f} of the best peer's time", found, most)
        yield _limit(f"{name}, AVX2: limit / time at least 0.78", found, 0.78)
        yield _planned(f"{name}, AVX2: the planner predicts the time within 10 %", found)
        yield _waiting(f"{name}, AVX2: a thread waits for another's part for less than 2 % of the time", found)
    yield _flat(peers["trace300"], peers["trace1500"])
    yield from _speculation(_read(results / "speculation.json"))
    yield _certificates([found for found in peers.values() if found])


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _is_narrow(found: dict[str, Any] | None) -> bool:
    """Whether a result is of a CPU without AVX-512."""
    return found is not None and found["environment"].get("vector") in ("AVX2", "AVX-VNNI")


def _machine(found: dict[str, Any]) -> str:
    """The CPU that a result was measured on, and what it was kept to."""
    environment = found["environment"]
    vector = environment.get("vector")
    kept = f", kept to {found['isa'].upper()}" if found.get("isa") else ""
    return f"{environment['cpu']}, {environment['cores']} cores{f', {vector}' if vector else ''}{kept}"


def _against_best(what: str, found: dict[str, Any] | None, most: float) -> Claim:
    if found is None:
        return Claim(what, "", None)
    seconds = {name: figures["median_s"] for name, figures in found["summary"].items()}
    ours = seconds.pop(_OURS)
    best = min(seconds, key=seconds.__getitem__)
    ratio = ours / seconds[best]
    label = found["systems"][best]["label"]
    measured = f"{ours:.2f} s against {seconds[best]:.2f} s of {label}: {ratio:.2f}"
    return Claim(what, measured, ratio <= most, _machine(found))


def _limit(what: str, found: dict[str, Any] | None, least: float) -> Claim:
    if found is None:
        return Claim(what, "", None)
    ours = found["summary"][_OURS]
    share = ours["limit_over_time"]
    measured = f"{share:.2f}; {ours['tile_limit_over_time']:.2f} by the tile loop's rate"
    return Claim(what, measured, share >= least, _machine(found))


def _planned(what: str, found: dict[str, Any] | None) -> Claim:
    """The median of the runs' ratios of predicted to measured seconds."""
    ratios = [said["predicted_s"] / run["total_s"] for run, said in _own_words(found)]
    if found is None or not ratios:
        return Claim(what, "", None)
    measured = f"{median(ratios):.2f} of it; run by run {', '.join(f'{ratio:.2f}' for ratio in sorted(ratios))}"
    return Claim(what, measured, abs(median(ratios) - 1) <= 0.10, _machine(found))


def _waiting(what: str, found: dict[str, Any] | None) -> Claim:
    shares = [said["waiting_s"] / run["total_s"] for run, said in _own_words(found)]
    if found is None or not shares:
        return Claim(what, "", None)
    return Claim(what, f"{max(shares):.2%} at most", max(shares) < 0.02, _machine(found))


def _own_words(found: dict[str, Any] | None) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """This engine's runs, each with what it said of itself."""
    return [(run, run["engine"]) for run in found["runs"] if run.get("engine")] if found else []


def _flat(few: dict[str, Any] | None, many: dict[str, Any] | None) -> Claim:
    what = "time per token flat within 10 % from 300 to 1500 requests"
    if few is None or many is None:
        return Claim(what, "", None)
    each = []
    for found in (few, many):
        work = found["workload"]
        each.append(1e3 * found["summary"][_OURS]["median_s"] / (work["prompt_tokens"] + work["output_tokens"]))
    measured = f"{each[0]:.3f} and {each[1]:.3f} ms"
    return Claim(what, measured, abs(each[1] / each[0] - 1) <= 0.10, _machine(many))


def _speculation(found: dict[str, Any] | None) -> Iterator[Claim]:
    for slots, least in ((8, 1.2), (1, 1.7), (128, 0.98)):
        what = f"recorded answers, {slots} slots: speculation on at least {least:g} times as fast as off"
        case = next((case for case in found["cases"] if case["slots"] == slots), None) if found else None
        if case is None:
            yield Claim(what, "", None)
        else:
            faster = case["times_faster"]
            measured = f"{case['off_s']:.2f} s off, {case['on_s']:.2f} s on: {faster:.2f}"
            yield Claim(what, measured, faster >= least, _machine(found))


def _certificates(found: list[dict[str, Any]]) -> Claim:
    proofs = [run["certificate"] for result in found for run in result["runs"] if run.get("certificate")]
    valid = sum(proof["verdict"] == "VALID" for proof in proofs)
    what = "every timed run of this engine has a VALID certificate, no logit further than 1e-4"
    if not proofs:
        return Claim(what, "", None)
    furthest = max(proof["max_abs"] for proof in proofs)
    return Claim(what, f"{valid} of {len(proofs)}, at most {furthest:.1e}", valid == len(proofs) and furthest <= 1e-4)


if __name__ == "__main__":
    main()
