"""`isologit bench serve`, `sweep`, `throughput` and `latency`: options in, a short table and an exit code out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isologit.bench.options import DEFAULT_PORT, METRICS, Backend, DatasetName, Metric, ServingOptions
from isologit.cli.exits import Exit, interrupt_on_sigterm, reporting_errors
from isologit.errors import ConfigError

if TYPE_CHECKING:
    from isologit.bench.serving import Measurement

bench_app = typer.Typer(
    no_args_is_help=True, help="Measure a server under load, or the engine's own throughput and latency."
)

_SERVER = "Which server"
_PROMPTS = "What is sent"
_LOAD = "When it is sent"
_OUTPUT = "What comes out"
_ENGINE = "How it runs"


def _option(panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **more)


BackendOption = Annotated[Backend, _option(_SERVER, help="The protocol the server is spoken to in.")]
BaseUrl = Annotated[str | None, _option(_SERVER, metavar="URL", help="Instead of --host and --port.")]
Host = Annotated[str, _option(_SERVER, help="The server's address.")]
Port = Annotated[int, _option(_SERVER, "--port", "-P", metavar="N", help="The server's port.")]
Endpoint = Annotated[str | None, _option(_SERVER, metavar="PATH", help="Default: the protocol's streaming path.")]
Model = Annotated[
    str | None,
    _option(_SERVER, metavar="NAME|DIR", help="Name to send, or a folder whose tokenizer counts tokens."),
]
ServedModelName = Annotated[str | None, _option(_SERVER, metavar="NAME", help="Name to send, when it is another.")]
TokenizerOption = Annotated[
    Path | None,
    _option(
        _SERVER, metavar="DIR|FILE", help="Counts tokens. Default: that of --model, or of the built-in demo model."
    ),
]
ApiKey = Annotated[
    str | None, _option(_SERVER, metavar="KEY", envvar="ISOLOGIT_API_KEY", help="Sent as a bearer token; never saved.")
]
DatasetNameOption = Annotated[
    DatasetName | None, _option(_PROMPTS, help="Default: custom with a --dataset-path, else built-in prompts.")
]
DatasetPath = Annotated[
    Path | None, _option(_PROMPTS, metavar="FILE", help="Prompts: Alpaca JSON, JSONL, or lines of text.")
]
NumPrompts = Annotated[
    int | None, _option(_PROMPTS, metavar="N", help="How many. Default: all of the file, or 1500 built-in ones.")
]
TestTime = Annotated[
    float | None,
    _option(_PROMPTS, "--test-time", "--test_time", "-T", metavar="S", help="As many as the rate sends in S seconds."),
]
MaxNewTokens = Annotated[int, _option(_PROMPTS, metavar="N", help="Longest answer where the dataset names none.")]
IgnoreEos = Annotated[bool, _option(_PROMPTS, "--ignore-eos", help="Let only the length end an answer.")]
NumWarmups = Annotated[int, _option(_PROMPTS, metavar="N", help="Requests sent before; none of them is timed.")]
Seed = Annotated[int, _option(_LOAD, metavar="N", help="Of the arrivals and of built-in prompts.")]
Burstiness = Annotated[
    float, _option(_LOAD, metavar="B", help="Shape of the gaps: 1 Poisson, less burstier, inf constant.")
]
ContestArrivals = Annotated[
    bool, _option(_LOAD, "--contest-arrivals", help="The contest's gaps of whole milliseconds around 1/rate.")
]
MaxConcurrency = Annotated[
    int | None, _option(_LOAD, metavar="N", help="Hold requests back while N are being answered.")
]
ResultDir = Annotated[Path, _option(_OUTPUT, metavar="DIR", help="Where result files go.")]
PercentileMetrics = Annotated[str, _option(_OUTPUT, metavar="LIST", help="Of ttft, tpot, itl, e2el.")]
MetricPercentiles = Annotated[str, _option(_OUTPUT, metavar="LIST", help="Which percentiles.")]
Goodput = Annotated[
    list[str] | None,
    _option(_OUTPUT, metavar="NAME:MS", help="Also count requests within this; ttft, tpot or e2el. Repeat for more."),
]


@bench_app.command("serve")
def serve(
    backend: BackendOption = "llm-serving",
    base_url: BaseUrl = None,
    host: Host = "127.0.0.1",
    port: Port = DEFAULT_PORT,
    endpoint: Endpoint = None,
    model: Model = None,
    served_model_name: ServedModelName = None,
    tokenizer: TokenizerOption = None,
    api_key: ApiKey = None,
    dataset_name: DatasetNameOption = None,
    dataset_path: DatasetPath = None,
    num_prompts: NumPrompts = None,
    test_time: TestTime = None,
    max_new_tokens: MaxNewTokens = 128,
    ignore_eos: IgnoreEos = False,
    num_warmups: NumWarmups = 1,
    request_rate: Annotated[
        float, _option(_LOAD, "--request-rate", "--qps", "-X", metavar="R", help="Requests a second; inf: all at once.")
    ] = math.inf,
    burstiness: Burstiness = 1.0,
    contest_arrivals: ContestArrivals = False,
    arrival_trace: Annotated[
        Path | None, _option(_LOAD, metavar="FILE", help="Send at the times of this file, in seconds, one a line.")
    ] = None,
    max_concurrency: MaxConcurrency = None,
    seed: Seed = 0,
    save_result: Annotated[bool, _option(_OUTPUT, "--save-result", help="Save the figures as JSON.")] = False,
    save_detailed: Annotated[
        bool, _option(_OUTPUT, "--save-detailed", help="Save every request's times and text as well.")
    ] = False,
    result_dir: ResultDir = Path("."),
    result_filename: Annotated[
        str | None, _option(_OUTPUT, metavar="NAME", help="Default: made of the options.")
    ] = None,
    out_dir: Annotated[
        Path | None,
        _option(
            _OUTPUT, "--out-dir", "--out_dir", "-O", metavar="DIR", help="Also write the contest's result file here."
        ),
    ] = None,
    percentile_metrics: PercentileMetrics = "ttft,tpot,itl,e2el",
    metric_percentiles: MetricPercentiles = "50,90,95,99",
    goodput: Goodput = None,
) -> None:
    """Put load on a server and measure it. Exit code 0: VALID, 1: not, with the reasons, 2: nothing was measured.

    Requests are sent at their times whether or not earlier ones are answered, and latencies count from those times.
    """
    with reporting_errors():
        options = ServingOptions(
            backend=backend,
            base_url=base_url,
            host=host,
            port=port,
            endpoint=endpoint,
            model=model,
            served_model_name=served_model_name,
            tokenizer=tokenizer,
            api_key=api_key,
            dataset_name=dataset_name,
            dataset_path=dataset_path,
            num_prompts=num_prompts,
            test_time=test_time,
            max_new_tokens=max_new_tokens,
            ignore_eos=ignore_eos,
            num_warmups=num_warmups,
            request_rate=request_rate,
            burstiness=burstiness,
            contest_arrivals=contest_arrivals,
            arrival_trace=arrival_trace,
            max_concurrency=max_concurrency,
            seed=seed,
            percentile_metrics=_metrics(percentile_metrics),
            metric_percentiles=_numbers(metric_percentiles, "--metric-percentiles"),
            goodput=_goodput(goodput or []),
        )
        measurement = _measure(options, detailed=save_detailed)
        if save_result or save_detailed:
            _save(measurement, result_dir, result_filename)
        if out_dir is not None:
            from isologit.bench.contest import write_contest_result

            print(write_contest_result(out_dir, request_rate, measurement.run))
    raise typer.Exit(Exit.OK if measurement.verdict.word == "VALID" else Exit.INVALID)


def _measure(options: ServingOptions, *, detailed: bool) -> Measurement:
    from isologit.bench.serving import measure_server
    from isologit.cli.bench_summary import print_measurement
    from isologit.cli.display import display

    interrupt_on_sigterm()
    with display(quiet=False) as observer:
        measurement = measure_server(options, detailed=detailed, observer=observer)
    print_measurement(measurement)
    return measurement


def _save(measurement: Measurement, folder: Path, name: str | None) -> None:
    from isologit.bench.files import write_json

    path = folder / (name or measurement.file_name)
    write_json(path, measurement.result)
    print(path)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.replace(",", " ").split())


def _metrics(text: str) -> tuple[Metric, ...]:
    wanted = _names(text)
    if unknown := sorted(set(wanted) - set(METRICS)):
        raise ConfigError(f'--percentile-metrics knows {", ".join(METRICS)}, not "{unknown[0]}"')
    return tuple(metric for metric in METRICS if metric in wanted)


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _names(text))
    except ValueError:
        raise ConfigError(f'{option} takes numbers with commas between them, not "{text}"') from None


def _goodput(given: list[str]) -> dict[str, float]:
    limits = {}
    for part in (part for text in given for part in _names(text)):
        name, _, limit = part.partition(":")
        try:
            limits[name] = float(limit)
        except ValueError:
            raise ConfigError(f'--goodput takes a metric and milliseconds such as ttft:200, not "{part}"') from None
    return limits
