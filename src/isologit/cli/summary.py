"""The short table at the end of a run."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from isologit.job.folder import OUTPUTS, REPORT
from isologit.job.memory_plan import GIB, MemoryPlan, Room, gib
from isologit.job.result import RunResult


def print_summary(result: RunResult) -> None:
    """Print what a run measured to standard output."""
    data = result.data
    console = Console()
    table = Table(title=f"{data['model']['name']} · {data['dataset']['name']}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(data):
        table.add_row(name, value)
    console.print(table)
    if data["profile"] is not None:
        console.print(_profile(data["profile"]))
    if result.num_failed:
        console.print(f"{result.num_failed} requests have no answer; {OUTPUTS} says why", markup=False, highlight=False)
    console.print(f"{result.folder / REPORT}", markup=False, highlight=False, soft_wrap=True)


def print_memory_plan(plan: MemoryPlan) -> None:
    """Print what every stage of a run will hold, and the proof that there is room for."""
    console = Console()
    for room, where in ((plan.host, ""), (plan.device, " on the device")):
        if room is not None:
            console.print(_room(room, f"memory by stage{where}, in GiB"))
    lines = [
        *(
            f"peak {gib(room.peak.nbytes)}; {room.allowed.limited_by} allows {gib(room.allowed.nbytes)}"
            for room in (plan.host, plan.device)
            if room is not None
        ),
        f"reference: {plan.reference}; baseline: {plan.baseline_dtype or 'none'}",
        *(line for line in (plan.no_baseline, plan.refusal) if line is not None),
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _room(room: Room, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for stage in room.stages:
        table.add_column(stage.name, justify="right")
    for name in dict.fromkeys(name for stage in room.stages for name in stage.parts):
        table.add_row(name, *(f"{stage.parts[name] / GIB:.2f}" if name in stage.parts else "" for stage in room.stages))
    table.add_section()
    table.add_row("in all", *(f"{stage.nbytes / GIB:.2f}" for stage in room.stages), style="bold")
    return table


def _rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    totals, outside = data["totals"], data["outside_total"]
    rows = [
        ("requests", f"{totals['completed']} completed, {totals['failed']} failed"),
        (
            "total time",
            f"{totals['total_s']:.2f} s (pre-process {totals['preprocess_s']:.2f}, inference "
            f"{totals['inference_s']:.2f}, post-process {totals['postprocess_s']:.2f})",
        ),
        ("not in it", f"load {outside['load_s']:.1f} s, warm-up {outside['warm_up_s']:.1f} s"),
        ("output", f"{totals['output_tokens']:,} tokens, {totals['output_tokens_per_s']:,.0f} tokens/s"),
    ]
    plan = data["plan"]
    if plan is not None:
        without = " without speculation" if data["engine"]["num_speculative_tokens"] else ""
        rows.append(
            (
                "plan",
                f"{plan['max_num_seqs']} slots, {plan['max_num_batched_tokens']} tokens a step; predicted "
                f"{plan['predicted_steps']} steps and {plan['predicted_s']:.2f} s{without}, took {plan['steps']} and "
                f"{plan['inference_s']:.2f} s",
            )
        )
    if data["mode"] == "replay":
        rows.insert(0, ("mode", "replay: outputs were forced from a record"))
    if len(data["segments"]) > 1:
        rows.append(("interrupted", f"{len(data['segments'])} segments, their times added up"))
    baseline = data["baseline"]
    if baseline is not None:
        same = "request" if baseline["requests"] == 1 else f"{baseline['requests']} requests"
        rows.append(
            (
                "speed-up",
                f"{baseline['speedup']:.1f}x on the same {same}: baseline "
                f"{baseline['seconds']:.2f} s in {baseline['dtype']}, engine {baseline['engine_s']:.2f} s",
            )
        )
    elif data["no_baseline"] is not None:
        rows.append(("speed-up", data["no_baseline"]))
    memory = data["memory"]
    rows.append(("memory", f"peak {gib(memory['peak_bytes'])}, planned {gib(memory['planned_peak_bytes'])}"))
    certificate = data["certificate"]
    if certificate["max_abs"] is not None:
        rows.append(
            (
                "largest |Δlogit|",
                f"{certificate['max_abs']:.3g} over {certificate['captured_rows']} rows; "
                f"{certificate['rescored']} requests re-scored",
            )
        )
    rows.append(("certificate", certificate["verdict"]))
    rows += [("reason", f"{reason['code']}: {reason['message']}") for reason in certificate["reasons"]]
    return rows


def _profile(found: dict[str, Any]) -> Table:
    table = Table(title="where the steps' time went", show_header=False, title_justify="left")
    for name, share in sorted(found["shares"].items(), key=lambda item: -item[1]):
        table.add_row(name, f"{found['seconds'][name]:.3f} s, {share:.1%}")
    table.add_row("outside the model", f"{found['host_share']:.1%}")
    if found["product_gflops"]:
        table.add_row(
            "products",
            f"{found['product_gflops']:.0f} GFLOP/s; a tile in the near caches {found['tile_gflops']:.0f}, "
            f"the library {found['library_product_gflops']:.0f}",
        )
    if found["narrow_steps"]:
        table.add_row(
            "narrowest steps", f"{found['narrow_step_gb_per_s']:.1f} GB/s; the machine {found['machine_gb_per_s']:.1f}"
        )
    table.add_row("limit / time", f"{found['limit_over_time']:.2f}")
    return table
