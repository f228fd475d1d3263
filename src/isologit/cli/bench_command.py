"""`isologit bench serve`, `sweep`, `throughput` and `latency`: options in, a short table and an exit code out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from isologit.bench.options import DEFAULT_PORT, METRICS, Backend, DatasetName, Metric, ServingOptions
from isologit.cli.engine_options import ENGINE_PANEL as _ENGINE
from isologit.cli.engine_options import BackendName, DeviceName, NumericsName
from isologit.cli.exits import Exit, interrupt_on_sigterm, reporting_errors
from isologit.config import EngineOptions, speculation
from isologit.errors import ConfigError, DatasetError, OutputFolderError
from isologit.job.options import DEFAULT_MAX_NEW_TOKENS, RunOptions
from isologit.workload.dataset import DatasetFormat

if TYPE_CHECKING:
    from isologit.bench.serving import Measurement

bench_app = typer.Typer(
    no_args_is_help=True, help="Measure a server under load, or the engine's own throughput and latency."
)

_SERVER = "Which server"
_PROMPTS = "What is sent"
_LOAD = "When it is sent"
_OUTPUT = "What comes out"

_ENGINE_DEFAULTS = EngineOptions()
_ALL_METRICS = ",".join(METRICS)
_PERCENTILES = "50,90,95,99"


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
        _SERVER, metavar="DIR|FILE", help="Counts tokens that the server does not count. Default: that of --model."
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
DatasetFormatOption = Annotated[DatasetFormat, _option(_PROMPTS, help="What the file is; auto tells by its content.")]
NumPrompts = Annotated[
    int | None, _option(_PROMPTS, metavar="N", help="How many. Default: all of the file, or 1500 built-in ones.")
]
TestTime = Annotated[
    float | None,
    _option(_PROMPTS, "--test-time", "--test_time", "-T", metavar="S", help="As many as the rate sends in S seconds."),
]
MaxNewTokens = Annotated[int, _option(_PROMPTS, metavar="N", help="Longest answer where the dataset names none.")]
IgnoreEos = Annotated[bool, _option(_PROMPTS, "--ignore-eos", help="Let only the length end an answer.")]
RequestTimeout = Annotated[
    float | None, _option(_LOAD, metavar="S", help="A request not answered whole in S seconds has failed.")
]
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
EngineModel = Annotated[
    str | None,
    _option(
        _ENGINE,
        "--model",
        metavar="DIR|FILE|PRESET",
        help="As for `isologit run`. Default: the built-in demo model.",
    ),
]
LoadFormat = Annotated[
    Literal["auto", "dummy"], _option(_ENGINE, help="dummy: seeded random weights of the model's shape.")
]
EngineTokenizer = Annotated[
    Path | None, _option(_ENGINE, metavar="DIR|FILE", help="Tokenizer, when the model's folder has none.")
]
MaxNumSeqs = Annotated[int | None, _option(_ENGINE, metavar="N", help="Requests running at once. Default: planned.")]
MaxNumBatchedTokens = Annotated[int | None, _option(_ENGINE, metavar="N", help="Tokens of one step. Default: planned.")]
SpeculativeTokens = Annotated[int, _option(_ENGINE, metavar="N", help="Most draft tokens, found by prompt lookup.")]
Threads = Annotated[int | None, _option(_ENGINE, metavar="N", help="Worker threads. Default: every core.")]
WeightCache = Annotated[
    bool, _option(_ENGINE, show_default=False, help="Keep packed weights of large models on disk (on).")
]
OutputJson = Annotated[Path | None, _option(_OUTPUT, metavar="FILE", help="Save the figures here.")]


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
    dataset_format: DatasetFormatOption = "auto",
    num_prompts: NumPrompts = None,
    test_time: TestTime = None,
    max_new_tokens: MaxNewTokens = 128,
    ignore_eos: IgnoreEos = False,
    request_timeout: RequestTimeout = None,
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
    percentile_metrics: PercentileMetrics = _ALL_METRICS,
    metric_percentiles: MetricPercentiles = _PERCENTILES,
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
            dataset_format=dataset_format,
            num_prompts=num_prompts,
            test_time=test_time,
            max_new_tokens=max_new_tokens,
            ignore_eos=ignore_eos,
            request_timeout=request_timeout,
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
        from isologit.bench.contest import write_contest_result
        from isologit.bench.serving import measure_server
        from isologit.cli.bench_summary import print_measurement
        from isologit.cli.display import display

        saved: list[Path] = []

        def keep(measurement: Measurement) -> None:
            if save_result or save_detailed:
                saved.append(_save(measurement, result_dir, result_filename))
            if out_dir is not None:
                saved.append(write_contest_result(out_dir, request_rate, measurement.run))

        if save_result or save_detailed:
            _require_writable(result_dir / (result_filename or "result.json"))
        if out_dir is not None:
            _require_writable(out_dir / "result.json")
        interrupt_on_sigterm()
        with display(quiet=False) as observer:
            measurement = measure_server(options, detailed=save_detailed, observer=observer, keep=keep)
        print_measurement(measurement)
        for path in saved:
            print(path)
        if measurement.run.interrupted:
            raise KeyboardInterrupt
    raise typer.Exit(Exit.OK if measurement.verdict.valid else Exit.INVALID)


def _save(measurement: Measurement, folder: Path, name: str | None = None) -> Path:
    from isologit.cli.bench_summary import print_measurement
    from isologit.common.files import write_json

    path = folder / (name or measurement.file_name)
    try:
        write_json(path, measurement.result)
    except OutputFolderError:
        print_measurement(measurement)  # the one place where it can still be seen
        raise
    return path


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


@bench_app.command("sweep")
def sweep(
    request_rates: Annotated[
        str, _option(_LOAD, "--request-rates", metavar="LIST", help="Requests a second, in this order; 5,10,inf.")
    ],
    backend: BackendOption = "llm-serving",
    base_url: BaseUrl = None,
    host: Host = "127.0.0.1",
    port: Port = DEFAULT_PORT,
    model: Model = None,
    served_model_name: ServedModelName = None,
    tokenizer: TokenizerOption = None,
    api_key: ApiKey = None,
    server_command: Annotated[
        str | None,
        _option(_SERVER, metavar="COMMAND", help="Start the server with this for every rate, and stop it after."),
    ] = None,
    dataset_name: DatasetNameOption = None,
    dataset_path: DatasetPath = None,
    dataset_format: DatasetFormatOption = "auto",
    num_prompts: NumPrompts = None,
    test_time: TestTime = None,
    max_new_tokens: MaxNewTokens = 128,
    ignore_eos: IgnoreEos = False,
    request_timeout: RequestTimeout = None,
    num_warmups: NumWarmups = 1,
    burstiness: Burstiness = 1.0,
    contest_arrivals: ContestArrivals = False,
    max_concurrency: MaxConcurrency = None,
    seed: Seed = 0,
    result_dir: ResultDir = Path("sweep"),
    percentile_metrics: PercentileMetrics = _ALL_METRICS,
    metric_percentiles: MetricPercentiles = _PERCENTILES,
    goodput: Goodput = None,
) -> None:
    """Put several rates of load on a server, one after the other; `isologit report DIR` draws what is saved.

    Exit code 0: all rates are VALID, 1: one is not, 2: nothing more could be measured.
    """
    with reporting_errors():
        options = ServingOptions(
            backend=backend,
            base_url=base_url,
            host=host,
            port=port,
            model=model,
            served_model_name=served_model_name,
            tokenizer=tokenizer,
            api_key=api_key,
            dataset_name=dataset_name,
            dataset_path=dataset_path,
            dataset_format=dataset_format,
            num_prompts=num_prompts,
            test_time=test_time,
            max_new_tokens=max_new_tokens,
            ignore_eos=ignore_eos,
            request_timeout=request_timeout,
            num_warmups=num_warmups,
            burstiness=burstiness,
            contest_arrivals=contest_arrivals,
            max_concurrency=max_concurrency,
            seed=seed,
            percentile_metrics=_metrics(percentile_metrics),
            metric_percentiles=_numbers(metric_percentiles, "--metric-percentiles"),
            goodput=_goodput(goodput or []),
        )
        from isologit.bench.sweep import run_sweep
        from isologit.cli.bench_summary import print_measurement
        from isologit.cli.display import display

        interrupt_on_sigterm()
        valid, saved = True, list[Path]()
        with display(quiet=False) as observer:
            for measurement in run_sweep(
                options,
                _numbers(request_rates, "--request-rates"),
                server_command=server_command,
                log_folder=result_dir,
                observer=observer,
                keep=lambda measurement: saved.append(_save(measurement, result_dir)),
            ):
                print_measurement(measurement)
                print(saved[-1])
                valid &= measurement.verdict.valid
        if measurement.run.interrupted:
            raise KeyboardInterrupt
    raise typer.Exit(Exit.OK if valid else Exit.INVALID)


@bench_app.command("throughput")
def throughput(
    model: EngineModel = None,
    load_format: LoadFormat = _ENGINE_DEFAULTS.load_format,
    tokenizer: EngineTokenizer = None,
    dataset_path: DatasetPath = None,
    dataset_format: DatasetFormatOption = "auto",
    num_prompts: NumPrompts = None,
    max_new_tokens: MaxNewTokens = DEFAULT_MAX_NEW_TOKENS,
    ignore_eos: IgnoreEos = False,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    speculative_tokens: SpeculativeTokens = _ENGINE_DEFAULTS.num_speculative_tokens,
    backend: BackendName = _ENGINE_DEFAULTS.backend,
    numerics: NumericsName = _ENGINE_DEFAULTS.numerics,
    device: DeviceName = _ENGINE_DEFAULTS.device,
    threads: Threads = None,
    weight_cache: WeightCache = _ENGINE_DEFAULTS.weight_cache,
    seed: Annotated[int, _option(_ENGINE, metavar="N", help="Of dummy weights.")] = _ENGINE_DEFAULTS.seed,
    output_json: OutputJson = None,
) -> None:
    """Run all prompts at once in this process, without HTTP and without proof: requests and tokens a second."""
    with reporting_errors():
        from isologit.bench.offline import measure_throughput
        from isologit.cli.display import display
        from isologit.job.engine import load_engine, require_backend
        from isologit.job.meter import InferenceMeter
        from isologit.job.preprocess import preprocess

        options = RunOptions(
            engine=EngineOptions(
                model=model,
                load_format=load_format,
                tokenizer=tokenizer,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                speculative_config=speculation(speculative_tokens),
                backend=backend,
                numerics=numerics,
                device=device,
                num_threads=threads,
                weight_cache=weight_cache,
                seed=seed,
            ),
            dataset=dataset_path,
            dataset_format=dataset_format,
            limit=num_prompts,
            ignore_eos=ignore_eos,
            max_new_tokens=max_new_tokens,
        )
        require_backend(options.engine)
        _require_writable(output_json)
        interrupt_on_sigterm()
        with display(quiet=False) as observer:
            observer.stage("load the model")
            engine = load_engine(options.engine, observer.loading)
            prepared = preprocess(options, engine)
            if prepared.refused:
                first = prepared.refused[0]
                raise DatasetError(f"{first.where}: {first.error}; every record of a measurement must run")
            observer.stage("run")
            limits = prepared.max_tokens
            meter = InferenceMeter(engine, observer, list(limits.values()))
            with meter.running():
                found = measure_throughput(
                    engine,
                    prepared.requests,
                    lambda output: meter.finished(len(output.token_ids), limits[output.request_id]),
                )
            engine.close()
        print(
            f"Throughput: {found['requests_per_second']:.2f} requests/s, {found['tokens_per_second']:.2f} total "
            f"tokens/s, {found['output_tokens_per_second']:.2f} output tokens/s"
        )
        _write_output(output_json, found)


@bench_app.command("latency")
def latency(
    model: EngineModel = None,
    load_format: LoadFormat = _ENGINE_DEFAULTS.load_format,
    batch_size: Annotated[int, _option(_PROMPTS, metavar="N", min=1, help="Requests run together.")] = 8,
    input_len: Annotated[int, _option(_PROMPTS, metavar="N", min=1, help="Tokens of each prompt, random.")] = 32,
    output_len: Annotated[int, _option(_PROMPTS, metavar="N", min=1, help="Tokens of each answer, exactly.")] = 128,
    num_iters: Annotated[int, _option(_PROMPTS, metavar="N", min=1, help="Times that are measured.")] = 30,
    num_iters_warmup: Annotated[int, _option(_PROMPTS, metavar="N", min=0, help="Times before.")] = 10,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    speculative_tokens: SpeculativeTokens = _ENGINE_DEFAULTS.num_speculative_tokens,
    backend: BackendName = _ENGINE_DEFAULTS.backend,
    numerics: NumericsName = _ENGINE_DEFAULTS.numerics,
    device: DeviceName = _ENGINE_DEFAULTS.device,
    threads: Threads = None,
    weight_cache: WeightCache = _ENGINE_DEFAULTS.weight_cache,
    seed: Annotated[
        int, _option(_ENGINE, metavar="N", help="Of the prompts and of dummy weights.")
    ] = _ENGINE_DEFAULTS.seed,
    output_json: OutputJson = None,
) -> None:
    """Run one batch of random prompts again and again in this process: seconds and their percentiles."""
    with reporting_errors():
        from isologit.bench.offline import measure_latency, random_batch
        from isologit.cli.display import display
        from isologit.common.progress import Progress
        from isologit.job.engine import load_engine, require_backend

        options = EngineOptions(
            model=model,
            load_format=load_format,
            max_num_seqs=batch_size,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=False,
            speculative_config=speculation(speculative_tokens),
            backend=backend,
            numerics=numerics,
            device=device,
            num_threads=threads,
            weight_cache=weight_cache,
            seed=seed,
        )
        require_backend(options)
        _require_writable(output_json)
        interrupt_on_sigterm()
        total = num_iters_warmup + num_iters
        with display(quiet=False) as observer:
            observer.stage("load the model")
            engine = load_engine(options, observer.loading)
            observer.stage("run")
            found = measure_latency(
                engine,
                random_batch(batch_size, input_len, output_len, vocab_size=engine.config.vocab_size, seed=seed),
                num_iters=num_iters,
                num_iters_warmup=num_iters_warmup,
                on_iteration=lambda done: observer.progress(Progress(done, total, done / total)),
            )
            engine.close()
        print(f"Avg latency: {found['avg_latency']} seconds")
        print(f"Std latency: {found['std_latency']} seconds")
        for percentage, seconds in found["percentiles"].items():
            print(f"{percentage}% percentile latency: {seconds} seconds")
        _write_output(output_json, found)


def _require_writable(path: Path | None) -> None:
    """Refuse before the measurement what could not be written after it."""
    if path is not None:
        from isologit.common.files import require_writable

        require_writable(path)


def _write_output(path: Path | None, found: dict[str, Any]) -> None:
    if path is not None:
        from isologit.common.files import write_json

        write_json(path, found)
        print(path)
