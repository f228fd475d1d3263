"""Medians, ratios and the Markdown table of a comparison. Pure functions of its result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import median
from typing import Any

OURS = "isologit"
AGREEMENT_TOKENS = 8


def agreement(outputs: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> float:
    """Share of the requests whose first `AGREEMENT_TOKENS` output tokens are the same."""
    same = [a[:AGREEMENT_TOKENS] == b[:AGREEMENT_TOKENS] for a, b in zip(outputs, ours, strict=True)]
    return sum(same) / len(same)


def summarise(runs: Sequence[dict[str, Any]], limits: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By system: median, least and most seconds, the ratio to this engine's median, and both limits over time.

    `runs` hold `system` and `seconds`; a ratio is left out when this engine did not run.
    """
    seconds: dict[str, list[float]] = {}
    for run in runs:
        seconds.setdefault(run["system"], []).append(run["seconds"])
    summary = {}
    for name, values in seconds.items():
        summary[name] = {
            "median_s": median(values),
            "least_s": min(values),
            "most_s": max(values),
            "limit_over_time": median(limit["limit_s"] for limit in limits) / median(values),
            "tile_limit_over_time": median(limit["tile_limit_s"] for limit in limits) / median(values),
        }
        if OURS in seconds:
            summary[name]["times_isologit"] = median(values) / median(seconds[OURS])
    return summary


def markdown(result: dict[str, Any]) -> str:
    """The table of a result, fastest first, with the machine's limit above and what could not run below."""
    workload, environment, summary = result["workload"], result["environment"], result["summary"]
    limits = result["limits"]
    lines = [
        f"## {workload['name']}: {workload['what']}",
        "",
        f"{workload['requests']} requests, {workload['prompt_tokens']} prompt and {workload['output_tokens']} output "
        f"tokens, `{workload['preset']}` with random {workload['dtype']} weights (seed {result['seed']}), float32 "
        f"arithmetic, lengths forced, greedy. {environment['cpu']}, {environment['cores']} cores; "
        f"interleaved repeats: {result['repeats']}, each system in its own process, loading and warm-up not counted."
        + (f" All kept to {result['isa'].upper()}." if result.get("isa") else ""),
        "",
        "| system | median s | range | × isologit | limit / time | tile limit / time | same tokens | peak GiB "
        "| settings |",
        "|---|---|---|---|---|---|---|---|---|",
        _limit_row("limit", "the library's product", limits, "flops", "limit_s") + f"{limits[0]['slots']} slots |",
        _limit_row("tile limit", "this engine's tile loop", limits, "tile_flops", "tile_limit_s") + " |",
    ]
    for name in sorted(summary, key=lambda system: summary[system]["median_s"]):
        lines.append(_row(result["systems"][name], summary[name], [r for r in result["runs"] if r["system"] == name]))
    planned = [(run["engine"], run["total_s"]) for run in result["runs"] if run.get("engine")]
    if planned:
        lines += ["", _own_words(planned)]
    proofs = [proof for run in result["runs"] if (proof := run.get("certificate")) is not None]
    if proofs:
        lines += ["", _certificates(proofs)]
    for failure in result["failures"]:
        lines += ["", f"{result['systems'][failure['system']]['label']} did not run: {failure['reason']}"]
    return "\n".join(lines) + "\n"


def _limit_row(name: str, what: str, limits: Sequence[dict[str, Any]], rate: str, limit: str) -> str:
    """A limit's row but for its settings."""
    seconds = [found[limit] for found in limits]
    return (
        f"| {name}: {what} at {median(found[rate] for found in limits) / 1e9:.0f} GFLOP/s, memory at "
        f"{median(found['bytes_per_s'] for found in limits) / 1e9:.1f} GB/s | {median(seconds):.2f} | "
        f"{min(seconds):.2f} to {max(seconds):.2f} | | | | | | "
    )


def _own_words(runs: Sequence[tuple[dict[str, Any], float]]) -> str:
    """What this engine said of its runs, each with the seconds that it took."""
    slots = sorted({said["max_num_seqs"] for said, _ in runs})
    each = ", ".join(f"{said['predicted_s']:.2f} s for {seconds:.2f}" for said, seconds in runs)
    waiting = max(said["waiting_s"] / seconds for said, seconds in runs)
    return (
        f"The planner's slots: {', '.join(map(str, slots))}; predicted: {each}. One thread waits for another's part "
        f"for {waiting:.1%} of the time at most."
    )


def _certificates(proofs: Sequence[dict[str, Any]]) -> str:
    verdicts = [proof["verdict"] for proof in proofs]
    rescored = sum(proof["tokens_rescored"] for proof in proofs)
    agreed = sum(proof["tokens_agreed"] for proof in proofs)
    return (
        f"Certificates of the timed isologit runs: {verdicts.count('VALID')} of {len(proofs)} VALID; "
        f"{sum(proof['captured_rows'] for proof in proofs)} logits rows kept during the runs, largest difference "
        f"{max(proof['max_abs'] for proof in proofs):.1e}; {agreed} of {rescored} re-scored tokens are the "
        f"reference's choice, {sum(proof['ties'] for proof in proofs)} are ties."
    )


def _row(system: dict[str, Any], figures: dict[str, float], runs: list[dict[str, Any]]) -> str:
    label = system["label"] + (f" {system['version']}" if system["version"] else "")
    if system["measured_requests"] is not None:
        label += f" ({system['measured_requests']} requests, scaled)"
    ratio = f"{figures['times_isologit']:.2f}" if "times_isologit" in figures else ""
    if len(runs) == 1:
        label += " (one run)"
    same = [run["agreement"] for run in runs if run["agreement"] is not None]
    settings = ", ".join(f"{key} {_plain(value)}" for key, value in system["settings"].items())
    return (
        f"| {label} | {figures['median_s']:.2f} | {figures['least_s']:.2f} to {figures['most_s']:.2f} | {ratio} | "
        f"{figures['limit_over_time']:.2f} | {figures['tile_limit_over_time']:.2f} | "
        f"{f'{min(same):.0%}' if same else ''} | {max(run['peak_memory_bytes'] for run in runs) / 2**30:.1f} | "
        f"{settings} ({system['settings_from']}) |"
    )


def _plain(value: object) -> str:
    return "chosen by the planner" if value is None else value if isinstance(value, str) else json.dumps(value)
