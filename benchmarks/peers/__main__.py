"""Run this engine and its peers on one workload and write a result file and a table.

benchmarks/peers/setup.sh                                # once: one environment per peer
python -m benchmarks.peers trace300                      # three interleaved repeats of everything
python -m benchmarks.peers trace300 --tune               # search for each system's best settings first
python -m benchmarks.peers tiny64 --systems isologit openvino --repeats 1
python -m benchmarks.peers trace300 --isa avx2           # all without AVX-512, on a CPU that has it
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.peers.comparison import Comparison, say_with_time
from benchmarks.peers.systems import SYSTEMS
from benchmarks.peers.workloads import WORKLOADS

_RESULTS = Path(__file__).parents[1] / "results"
_TUNING_REQUESTS = 60


def main() -> None:
    """Parse the arguments, run, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3)
    slow = [name for name, system in SYSTEMS.items() if system.slow]
    parser.add_argument("--once", nargs="*", choices=SYSTEMS, default=slow, metavar="NAME", help="not repeated")
    parser.add_argument("--requests", type=int, help="only the first so many (with --tune: 60 unless given)")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="how weights are stored")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and prompts")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds one run may take with its loading")
    parser.add_argument("--isa", choices=("avx2",), help="keep this engine and those peers that can to AVX2")
    parser.add_argument("--tune", action="store_true", help="find settings and keep them in tuned.json")
    parser.add_argument("--output", type=Path, help="result file; benchmarks/results/peers-WORKLOAD... unless given")
    args = parser.parse_args()
    workload = WORKLOADS[args.workload]
    count = args.requests or (_TUNING_REQUESTS if args.tune else None)
    systems = [SYSTEMS[name] for name in args.systems]
    if args.isa:
        systems = [system.narrowed() for system in systems if system.avx2]
    comparison = Comparison(
        workload=workload,
        systems=systems,
        lengths=workload.lengths()[:count],
        repeats=args.repeats,
        seed=args.seed,
        dtype=args.dtype,
        once=frozenset(args.once),
        timeout_s=args.timeout,
        say=say_with_time,
        isa=args.isa,
    )
    if args.tune:
        comparison.tune()
        return
    parts = [
        "peers",
        workload.name,
        *([str(count)] if count else []),
        *([args.dtype] if args.dtype != "float32" else []),
        *([args.isa] if args.isa else []),
    ]
    output = args.output or _RESULTS / f"{'-'.join(parts)}.json"
    comparison.run(output)
    print(output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
