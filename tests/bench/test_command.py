"""`isologit bench` as it is typed: files, exit codes and words."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.bench.fake_server import FakeServer, fake_server
from typer.testing import CliRunner, Result

from isologit.cli.app import app
from isologit.errors import OutputFolderError


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def _serve(server: FakeServer, *arguments: str) -> Result:
    return _run("serve", "-P", str(server.port), *arguments)


def _only_json(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_the_contests_flags_give_the_contests_file_and_line(tmp_path: Path) -> None:
    with fake_server() as server:
        done = _serve(server, "-X", "50", "-T", "0.4", "-O", str(tmp_path), "--contest-arrivals")
    assert "INVALID" not in done.output
    records = json.loads((tmp_path / "result_50.0_x.json").read_text())
    assert len(records) == 20
    assert all(set(one) == {"input", "resp_text", "res_time", "first_token_time"} for one in records)
    assert all(0 < one["first_token_time"] <= one["res_time"] for one in records)
    assert "All Tasks Done; Exec Time is " in done.output
    assert len(server.bodies) == 21  # one to warm up
    assert server.bodies[0]["inputs"] not in [one["input"] for one in records]


def test_all_answered_on_time_is_exit_code_0(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.write_text("one\ntwo\n")
    with fake_server(token_s=0.2) as server:
        done = _serve(server, "--dataset-path", str(prompts), "--max-new-tokens", "10", "--num-warmups", "0")
    assert done.exit_code == 0, done.output
    assert "VALID" in done.output.splitlines()


@pytest.mark.parametrize("backend", ["openai", "openai-chat", "tgi"])
def test_result_has_vllms_keys_and_what_they_lack(tmp_path: Path, backend: str) -> None:
    with fake_server(token_s=0.001, words_per_message=2) as server:
        done = _serve(
            server, "--backend", backend, "--num-prompts", "5", "--request-rate", "100", "--ignore-eos",
            "--save-detailed", "--result-dir", str(tmp_path), "--goodput", "ttft:5000", "--api-key", "hidden",
        )  # fmt: skip
    assert done.exit_code in (0, 1), done.output
    found = _only_json(tmp_path)
    assert "hidden" not in json.dumps(found)
    assert server.headers[-1]["Authorization"] == "Bearer hidden"
    assert found["completed"] == found["issued"] == found["num_prompts"] == 5
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    vllm = (
        "duration failed total_input_tokens total_output_tokens output_throughput total_token_throughput mean_ttft_ms "
        "median_tpot_ms std_itl_ms p99_e2el_ms"
    )
    assert all(found[key] is not None for key in vllm.split())
    lists = "input_lens output_lens ttfts itls latencies start_times generated_texts errors request_ids statuses"
    assert {len(found[key]) for key in lists.split()} == {5}
    assert found["statuses"] == ["completed"] * 5
    assert found["output_lens"] != [len(gaps) + 1 for gaps in found["itls"]]  # not counted by chunks
    assert (
        found["reported_output_tokens"]
        == found["total_output_tokens"]
        == sum(body_limit(body) for body in server.bodies[1:])
    )
    assert set(found["hashes"]) == {"requests", "options", "arrivals", "texts"}
    assert found["environment"]["versions"]["aiohttp"]
    assert found["model_id"] == ("llama2" if backend == "tgi" else "fake")


def body_limit(body: dict[str, Any]) -> int:
    limit = body.get("max_tokens") or body.get("max_completion_tokens") or body["parameters"]["max_new_tokens"]
    return int(limit)


def test_a_failed_request_is_invalid_and_exit_code_1(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.write_text("fine\nfail:cut\n")
    with fake_server() as server:
        done = _serve(
            server, "--dataset-path", str(prompts), "--save-result", "--result-dir", str(tmp_path),
            "-O", str(tmp_path / "c"),
        )  # fmt: skip
    assert done.exit_code == 1
    assert "INVALID" in done.output
    assert "All Tasks Done" not in done.output
    found = _only_json(tmp_path)
    assert found["verdict"] == "INVALID"
    assert [reason["code"] for reason in found["reasons"]] == ["failed_requests"]
    assert [failure["id"] for failure in found["failures"]] == ["1"]
    assert "request_ids" not in found  # without --save-detailed
    assert len(json.loads((tmp_path / "c" / "result_inf_x.json").read_text())) == 1


def test_killing_the_server_ends_in_invalid(tmp_path: Path) -> None:
    with fake_server(token_s=0.05) as server:

        def kill() -> None:
            while len(server.bodies) < 10:
                time.sleep(0.02)
            server.stop()

        killer = threading.Thread(target=kill)
        killer.start()
        done = _serve(
            server, "-X", "20", "-T", "60", "--num-warmups", "0", "--save-result", "--result-dir", str(tmp_path)
        )
        killer.join()
    assert done.exit_code == 1
    found = _only_json(tmp_path)
    assert found["verdict"] == "INVALID"
    assert [reason["code"] for reason in found["reasons"]] == ["server_gone", "failed_requests", "unsent_requests"]
    assert found["issued"] == 1200 == found["completed"] + found["failed"]


def test_what_the_user_must_change_is_exit_code_2() -> None:
    with fake_server() as server:
        assert _serve(server, "--metric-percentiles", "most").exit_code == 2
        assert _serve(server, "--percentile-metrics", "ttft,speed").exit_code == 2
        assert _serve(server, "--goodput", "ttft").exit_code == 2
        assert _serve(server, "--dataset-path", "missing").exit_code == 2
        wrong_path = _serve(server, "--endpoint", "/nowhere", "--num-prompts", "1")
    assert wrong_path.exit_code == 2
    assert "warm-up request failed: HTTP 404" in wrong_path.output
    assert _serve(server, "--num-prompts", "1").exit_code == 2  # nobody listens any more


@pytest.mark.parametrize("backend", ["openai", "openai-chat", "tgi", "llm-serving"])
@pytest.mark.parametrize("counts", [True, False])
def test_another_servers_tokens_are_not_counted_by_the_demo_models_tokenizer(
    tmp_path: Path, backend: str, counts: bool
) -> None:
    with fake_server(words_per_message=2, counts=counts) as server:
        done = _serve(
            server, "--backend", backend, "--num-prompts", "3", "--save-detailed", "--result-dir", str(tmp_path)
        )
    assert done.exit_code in (0, 1), done.output
    found = _only_json(tmp_path)
    assert found["tokenizer_id"] is None
    if counts:
        assert found["output_lens"] == [body_limit(body) for body in server.bodies[1:]]
        assert found["output_tokens_counted_by"] == "the server"
        assert found["input_lens"] == [None if backend == "llm-serving" else 7] * 3
        assert "counted by the server" in done.output
    else:
        assert found["output_lens"] == [None] * 3
        assert found["output_tokens_counted_by"] is None
        tokens = "total_output_tokens output_throughput total_token_throughput mean_tpot_ms p99_tpot_ms"
        assert [found[key] for key in tokens.split()] == [None] * 5
        assert found["mean_ttft_ms"] > 0
        assert "--tokenizer" in done.output


def test_the_demo_models_tokenizer_counts_for_a_server_of_the_demo_model(tmp_path: Path) -> None:
    with fake_server(models=["isologit-demo", "llama2"], counts=False) as server:
        _serve(server, "--num-prompts", "3", "--save-detailed", "--result-dir", str(tmp_path))
    found = _only_json(tmp_path)
    assert found["tokenizer_id"] == "built-in demo"
    assert found["output_tokens_counted_by"] == "the tokenizer of built-in demo"
    assert all(count > 0 for count in found["output_lens"] + found["input_lens"])


def test_an_address_that_ends_in_v1_is_the_same_server(tmp_path: Path) -> None:
    with fake_server() as server:
        for url in (f"{server.url}/v1", f"{server.url}/v1/"):
            done = _run("serve", "--backend", "openai", "--base-url", url, "--num-prompts", "2")
            assert done.exit_code in (0, 1), done.output
    assert set(server.paths) == {"/v1/completions"}


@pytest.mark.parametrize("backend", ["openai", "openai-chat", "tgi", "llm-serving"])
def test_where_nobody_listens_the_advice_is_about_the_address(backend: str) -> None:
    with fake_server() as server:
        url = server.url
    gone = _run("serve", "--backend", backend, "--base-url", f"{url}/v1", "--num-prompts", "1")
    assert gone.exit_code == 2
    assert f"nobody answers at {url}; start the server there" in gone.output
    assert "--served-model-name" not in gone.output
    unknown = _run("serve", "--backend", backend, "--base-url", "http://no-such-host.invalid/v1", "--num-prompts", "1")
    assert unknown.exit_code == 2
    assert "no host of that name" in unknown.output
    assert "isologit serve" not in unknown.output


def test_a_file_that_cannot_be_written_any_more_does_not_hide_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_json(path: Path, value: object) -> None:
        raise OutputFolderError(f"{path}: cannot be written (No space left on device); choose another place")

    monkeypatch.setattr("isologit.common.files.write_json", write_json)
    with fake_server() as server:
        done = _serve(server, "--num-prompts", "2", "--save-result", "--result-dir", str(tmp_path))
    assert done.exit_code == 2
    assert "cannot be written" in done.output
    assert "2 of 2 completed" in done.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--base-url", "http://127.0.0.1:9", "--num-prompts", "1", "--save-result", "--result-dir"),
        ("serve", "--base-url", "http://127.0.0.1:9", "--num-prompts", "1", "-O"),
        ("throughput", "--num-prompts", "1", "--output-json"),
        ("latency", "--num-iters", "1", "--output-json"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("")
    done = _run(*arguments, str(tmp_path / "file" / "inner"))
    assert done.exit_code == 2
    assert done.output.splitlines()[-1].startswith(f"error: {tmp_path / 'file'}")
    assert "cannot be written" in done.output


def test_a_request_past_its_time_makes_the_run_invalid(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.write_text("one\ntwo\n")
    with fake_server(token_s=0.05) as server:
        done = _serve(
            server, "--dataset-path", str(prompts), "--max-new-tokens", "50", "--num-warmups", "0",
            "--request-timeout", "0.5",
        )  # fmt: skip
    assert done.exit_code == 1, done.output
    assert "not answered whole within 0.5 s" in done.output


def test_a_trace_is_replayed_at_its_own_rate(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text("".join(f"{1000 + 0.05 * i}\n" for i in range(9)))
    with fake_server() as server:
        done = _serve(
            server, "--arrival-trace", str(trace), "--num-prompts", "9", "--save-detailed",
            "--result-dir", str(tmp_path), "--result-filename", "r.json",
        )  # fmt: skip
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["request_rate"] == 20.0
    assert "sent at 20.0 a second" in done.output
    assert found["start_times"] == pytest.approx([0.05 * i for i in range(9)])


def test_sweep_saves_every_rate(tmp_path: Path) -> None:
    with fake_server() as server:
        done = _run(
            "sweep", "--port", str(server.port), "--request-rates", "40,80", "--num-prompts", "6",
            "--result-dir", str(tmp_path),
        )  # fmt: skip
    assert done.exit_code in (0, 1), done.output
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert sorted(one["request_rate"] for one in found) == [40.0, 80.0]
    assert all(one["completed"] == 6 for one in found)
    assert all(len(one["ttfts"]) == 6 for one in found)


def test_sweep_starts_the_server_anew_for_every_rate(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "server.py"
    script.write_text(
        "import asyncio, os, sys\n"
        "print('pid', os.getpid(), flush=True)\n"
        "async def answer(reader, writer):\n"
        "    await reader.read(65536)\n"
        '    body = b\'{"generated_text": "x", "finish_reason": "eos", "generated_tokens": 1}\\n\'\n'
        "    writer.write(b'HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\n' + body)\n"
        "    await writer.drain()\n"
        "    writer.close()\n"
        "async def main():\n"
        "    server = await asyncio.start_server(answer, '127.0.0.1', int(sys.argv[1]))\n"
        "    await server.serve_forever()\n"
        "asyncio.run(main())\n"
    )
    arguments = ("sweep", "--port", str(port), "--request-rates", "50,inf", "--num-prompts", "3")
    command = f"{sys.executable} {script} {port}"
    done = _run(*arguments, "--server-command", command, "--result-dir", str(tmp_path / "out"))
    assert done.exit_code in (0, 1), done.output
    assert len(list((tmp_path / "out").glob("*.json"))) == 2
    log = (tmp_path / "out" / "server.log").read_text().splitlines()
    assert len({line for line in log if line.startswith("pid")}) == 2
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    broken = _run(
        *arguments, "--server-command", f"{sys.executable} -c raise(SystemExit(7))", "--result-dir", str(tmp_path)
    )
    assert broken.exit_code == 2
    assert "ended with exit code 7" in broken.output


def test_the_engine_alone_is_measured_on_the_demo_model(tmp_path: Path) -> None:
    done = _run("throughput", "--num-prompts", "3", "--threads", "1", "--output-json", str(tmp_path / "t.json"))
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["num_requests"] == 3
    assert found["total_num_tokens"] > found["total_output_tokens"] > 0
    assert "Throughput: " in done.output
    sizes = (
        "--batch-size",
        "2",
        "--input-len",
        "5",
        "--output-len",
        "4",
        "--num-iters",
        "2",
        "--num-iters-warmup",
        "1",
    )
    done = _run("latency", *sizes, "--threads", "1", "--output-json", str(tmp_path / "l.json"))
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "l.json").read_text())
    assert len(found["latencies"]) == 2
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 2)
    assert found["engine"]["backend"] == "cpu"


def test_the_engine_alone_is_measured_on_the_backend_that_is_named(tmp_path: Path) -> None:
    sizes = (
        "--batch-size",
        "1",
        "--input-len",
        "3",
        "--output-len",
        "2",
        "--num-iters",
        "1",
        "--num-iters-warmup",
        "0",
    )
    done = _run("latency", *sizes, "--backend", "torch", "--output-json", str(tmp_path / "l.json"))
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "l.json").read_text())["engine"]["backend"] == "torch"
    for command in ("latency", "throughput"):
        refused = _run(command, "--backend", "none", "--device", "cpu")
        assert refused.exit_code == 2
        assert 'backend "none" is unknown' in refused.output


@pytest.mark.parametrize("command", ["throughput", "latency"])
def test_a_backend_that_cannot_run_is_refused_before_anything_is_loaded(command: str) -> None:
    done = _run(command, "--backend", "cpu", "--device", "cuda")
    assert done.exit_code == 2
    assert 'backend "cpu" cannot run here: it runs on the CPU only; usable are cpu, torch' in done.output
    assert "load" not in done.output
