"""What speculation gains on recorded answers: the same replay with speculation off and on, at several slot counts.

    python -m benchmarks.speculation --dataset PROMPTS --replay ANSWERS --tokenizer DIR

The recorded tokens are forced and everything is computed, so lengths and the accepted draft tokens are those of the
model that made the record, whatever the weights. Off and on alternate in one process; medians are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers.limits import least_seconds, measure_rates
from benchmarks.peers.models import model_folder

from isologit import LLM, GenerationRequest, SamplingParams
from isologit.common.environment import describe_environment
from isologit.common.files import write_json
from isologit.config import load_model_config
from isologit.text.tokenizer import load_tokenizer
from isologit.workload import RequestSpec, load_dataset, load_replay

_RESULTS = Path(__file__).parent / "results"
_BYTES = {"float32": 4, "float16": 2}
_CASES = ((1, 40), (8, 160), (128, 400))  # slots, and requests that keep them busy long enough to measure


def main() -> None:
    """Run all cases, write the result file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--replay", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--model", default="llama-110m", help="preset; its weights are random")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="how weights are stored")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=_RESULTS / "speculation.json")
    args = parser.parse_args()
    requests = _requests(args.dataset, args.replay, args.tokenizer)
    config = load_model_config(args.model)
    folder = model_folder(args.model, seed=args.seed, dtype=args.dtype)
    result: dict[str, Any] = {
        "benchmark": "speculation",
        "model": args.model,
        "dtype": args.dtype,
        "seed": args.seed,
        "repeats": args.repeats,
        "environment": describe_environment(),
        "cases": [],
    }
    for slots, count in _CASES:
        part = _spread(requests, count)
        lengths = [(len(r.prompt_token_ids), r.params.max_tokens) for r in part]
        limit = least_seconds(config, lengths, measure_rates(), _BYTES[args.dtype], slots=(slots,))
        case = {"slots": slots, "requests": len(part), "limit_of_plain_run_s": limit["limit_s"]}
        engines = {name: _engine(folder, slots, speculative=name == "on") for name in ("off", "on")}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
        for _ in range(args.repeats):
            for name, engine in engines.items():
                runs[name].append(_run(engine, part))
                print(f"{slots} slots, {name}: {runs[name][-1]['seconds']:.2f} s", flush=True)
        for engine in engines.values():
            engine.close()
        off, on = (median(run["seconds"] for run in runs[name]) for name in ("off", "on"))
        result["cases"].append({**case, "off_s": off, "on_s": on, "times_faster": off / on, "runs": runs})
        write_json(args.output, result)
    table = _table(result)
    args.output.with_suffix(".md").write_text(table)
    print(table)


def _requests(dataset: Path, replay: Path, tokenizer_path: Path) -> list[GenerationRequest]:
    tokenizer = load_tokenizer(tokenizer_path)
    recorded = load_replay(replay, tokenizer)
    found = []
    for spec in load_dataset(dataset, tokenizer, default_max_new_tokens=1):
        if isinstance(spec, RequestSpec) and recorded.get(spec.id):
            ids = spec.prompt_token_ids or tokenizer.encode(spec.prompt)
            answer = recorded[spec.id]
            params = SamplingParams(max_tokens=len(answer), ignore_eos=True)
            found.append(GenerationRequest(spec.id, ids, params, replay_token_ids=answer))
    return found


def _spread(requests: Sequence[GenerationRequest], count: int) -> list[GenerationRequest]:
    """`count` requests evenly spread over their lengths."""
    if count >= len(requests):
        return list(requests)
    by_length = sorted(requests, key=lambda request: request.params.max_tokens)
    return [by_length[(2 * k + 1) * len(requests) // (2 * count)] for k in range(count)]


def _engine(folder: Path, slots: int, *, speculative: bool) -> LLM:
    llm = LLM(folder, max_num_seqs=slots, speculative_config={} if speculative else None)
    llm.warm_up()
    return llm


def _run(llm: LLM, requests: Sequence[GenerationRequest]) -> dict[str, Any]:
    start = time.perf_counter()
    outputs = {output.request_id: output.token_ids for output in llm.run(requests)}
    seconds = time.perf_counter() - start
    if any(outputs[request.request_id] != request.replay_token_ids for request in requests):
        raise RuntimeError("a replay gave other tokens than it was given")
    steps = llm.step_records
    proposed, accepted = (sum(getattr(s, f"num_{name}_tokens") for s in steps) for name in ("draft", "accepted"))
    tokens = sum(map(len, outputs.values()))
    return {"seconds": seconds, "steps": len(steps), "tokens": tokens, "proposed": proposed, "accepted": accepted}


def _table(result: dict[str, Any]) -> str:
    environment = result["environment"]
    lines = [
        f"Replay of recorded answers on `{result['model']}` (random {result['dtype']} weights, seed {result['seed']}). "
        f"{environment['cpu']}, {environment['cores']} cores; {result['repeats']} interleaved repeats, medians. "
        "The limit is that of a run without speculation.",
        "",
        "| slots | requests | off s | on s | times faster | steps off | steps on | accepted draft tokens | limit s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        off, on = case["runs"]["off"][0], case["runs"]["on"][0]
        lines.append(
            f"| {case['slots']} | {case['requests']} | {case['off_s']:.2f} | {case['on_s']:.2f} | "
            f"{case['times_faster']:.2f} | {off['steps']} | {on['steps']} | "
            f"{on['accepted']} of {on['proposed']} | {case['limit_of_plain_run_s']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
