"""The contest's server YAML: what it sets, what it may not say, and a server started from one."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from tests.checkpoints.mindspore_writer import mindformers_names, write_mindspore_ckpt
from typer.testing import CliRunner

from isologit import LLM, SamplingParams
from isologit.checkpoints.checkpoint import open_checkpoint
from isologit.cli.app import app
from isologit.common.processes import server_process
from isologit.errors import ConfigError
from isologit.server.contest_config import ContestConfig, load_contest_config
from isologit.workload import demo_model_path

CONTEST: dict[str, Any] = {
    "model_config": {
        "model_name": "llama_7b",
        "max_generate_length": 4096,
        "end_token": 2,
        "seq_length": [4096],
        "vocab_size": 32000,
        "prefill_batch_size": [1],
        "decode_batch_size": [1],
        "zactivate_len": [512, 1024, 2048, 4096],
        "model_type": "dyn",
        "seq_type": "static",
        "batch_waiting_time": 0.0,
        "decode_batch_waiting_time": 0.0,
        "batching_strategy": "continuous",
        "current_index": False,
        "page_attention": True,
        "model_dtype": "DataType.FLOAT32",
        "pad_token_id": 0,
        "backend": "kbk",
        "model_cfg_path": "models/predict_llama2_7b.yaml",
    },
    "serving_config": {
        "agent_ports": [16002],
        "start_device_id": 0,
        "server_ip": "localhost",
        "server_port": 8835,
        "enable_host_post_sampling": False,
    },
    "pa_config": {"num_blocks": 1024, "block_size": 16, "decode_seq_length": 4096},
    "tokenizer": {"type": "LlamaTokenizer", "vocab_file": "models/tokenizer.model"},
    "basic_inputs": {"type": "LlamaBasicInputs"},
    "extra_inputs": {"type": "LlamaExtraInputs"},
    "warmup_inputs": {"type": "LlamaWarmupInputs"},
}
SET = {
    "model_config.model_name", "model_config.max_generate_length", "model_config.seq_length",
    "model_config.decode_batch_size", "model_config.model_cfg_path", "serving_config.server_ip",
    "serving_config.server_port", "tokenizer.vocab_file",
}  # fmt: skip


def write(folder: Path, tree: Any, model: Any = None, /, **changes: Any) -> Path:
    """The YAML and the MindFormers YAML it points to; changes are `section__key`."""
    if isinstance(tree, dict):
        tree = {section: dict(content) if isinstance(content, dict) else content for section, content in tree.items()}
        for name, value in changes.items():
            section, key = name.split("__")
            tree[section][key] = value
    (folder / "models").mkdir(exist_ok=True)
    (folder / "models" / "predict_llama2_7b.yaml").write_text(yaml.safe_dump(model or {"load_checkpoint": ""}))
    path = folder / "llama_7b_kbk_pa_dyn.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def test_every_key_of_the_contests_file_is_used_or_said_to_be_ignored(tmp_path: Path) -> None:
    found = load_contest_config(write(tmp_path, CONTEST))
    ignored = found.ignored
    assert found == ContestConfig(
        model=tmp_path / "models",
        tokenizer=tmp_path / "models" / "tokenizer.model",
        name="llama_7b",
        host="localhost",
        port=8835,
        max_num_seqs=1,
        max_model_len=4096,
        ignored=ignored,
    )
    keys = {f"{section}.{key}" for section, content in CONTEST.items() for key in content}
    assert [line.split(" ")[0] for line in ignored] == [key for key in _in_order() if key in keys - SET]
    assert all(" has no effect: " in line and "not one of" not in line for line in ignored)


def _in_order() -> list[str]:
    return [f"{section}.{key}" for section in sorted(CONTEST) for key in sorted(CONTEST[section])]


def test_lists_and_numbers_mean_the_same(tmp_path: Path) -> None:
    found = load_contest_config(write(tmp_path, CONTEST, model_config__decode_batch_size=64))
    assert found.max_num_seqs == 64
    found = load_contest_config(write(tmp_path, CONTEST, model_config__decode_batch_size=[1, 8, 128]))
    assert found.max_num_seqs == 128
    found = load_contest_config(write(tmp_path, CONTEST, model_config__seq_length=[2048, 512]))
    assert found.max_model_len == 512  # the last is the limit, as in the original
    found = load_contest_config(write(tmp_path, CONTEST, model_config__max_generate_length=600))
    assert found.max_model_len == 600


def test_a_file_that_says_little_leaves_the_rest_open(tmp_path: Path) -> None:
    assert load_contest_config(write(tmp_path, {"serving_config": {"server_port": 9000}})) == ContestConfig(port=9000)
    assert load_contest_config(write(tmp_path, {"model_config": None})) == ContestConfig()


def test_paths_count_from_the_yaml_before_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    path = write(tmp_path, CONTEST)
    (tmp_path / "models" / "tokenizer.model").touch()
    Path("models").mkdir()
    Path("models/tokenizer.model").touch()
    assert load_contest_config(path).tokenizer == tmp_path / "models" / "tokenizer.model"
    (tmp_path / "models" / "tokenizer.model").unlink()
    assert load_contest_config(path).tokenizer == Path("models/tokenizer.model")
    absolute = load_contest_config(write(tmp_path, CONTEST, tokenizer__vocab_file=str(here / "t.model")))
    assert absolute.tokenizer == here / "t.model"


def test_the_mindformers_yaml_names_the_checkpoint(tmp_path: Path) -> None:
    def model(tree: Any) -> Path | None:
        return load_contest_config(write(tmp_path, CONTEST, tree)).model

    folder = tmp_path / "models"
    assert model({"load_checkpoint": "llama2_7b.ckpt"}) == folder / "llama2_7b.ckpt"
    assert model({"load_checkpoint": str(tmp_path / "other")}) == tmp_path / "other"
    inner = {"model": {"model_config": {"type": "LlamaConfig", "checkpoint_name_or_path": "llama2_7b"}}}
    assert model(inner) == folder  # a name to fetch is not a file
    (folder / "llama2_7b").mkdir()
    assert model(inner) == folder / "llama2_7b"
    assert model({"load_checkpoint": "a.ckpt", **inner}) == folder / "a.ckpt"
    assert load_contest_config(write(tmp_path, CONTEST, inner)).model_config == folder / "predict_llama2_7b.yaml"
    assert load_contest_config(write(tmp_path, CONTEST, {"load_checkpoint": "a.ckpt"})).model_config is None
    with pytest.raises(ConfigError, match="load_checkpoint must be text"):
        model({"load_checkpoint": ["a.ckpt"]})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_config__seq_length": []}, "seq_length is an empty list"),
        ({"model_config__seq_length": "4096"}, "seq_length must be a whole number"),
        ({"model_config__seq_length": [4096, 0]}, "seq_length must be a whole number of at least 1, not 0"),
        ({"model_config__decode_batch_size": True}, "decode_batch_size must be a whole number"),
        ({"model_config__decode_batch_size": None}, "decode_batch_size must be a whole number"),
        ({"model_config__max_generate_length": [4096]}, "max_generate_length must be a whole number"),
        ({"model_config__model_name": 7}, "model_name must be text"),
        ({"model_config__model_cfg_path": None}, "model_cfg_path must be text"),
        ({"model_config__model_cfg_path": "gone.yaml"}, "gone.yaml: cannot be read"),
        ({"serving_config__server_port": "8835"}, "server_port must be a whole number"),
        ({"serving_config__server_ip": ["a"]}, "server_ip must be text"),
        ({"tokenizer__vocab_file": ""}, "vocab_file must be text"),
        ({"model_config__decode_batchsize": [64]}, "no key model_config.decode_batchsize; did you mean model_config.d"),
        ({"serving_config__sever_port": 1}, "did you mean serving_config.server_port"),
    ],
)
def test_what_is_wrong_is_told_with_its_key(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_contest_config(write(tmp_path, CONTEST, **change))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "not a mapping"),
        ("model_config: [", "is not YAML"),
        ("", "not a mapping"),
        ("model_config: 5\n", "model_config must be a section"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_contest_config(write(tmp_path, text))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_contest_config(tmp_path / "missing.yaml")


def test_keys_of_others_are_said_to_be_unknown(tmp_path: Path) -> None:
    tree = {**CONTEST, "mine": {"a": 1}, "note": "hello"}
    lines = load_contest_config(write(tmp_path, tree)).ignored
    assert "mine.a has no effect: it is not one of the contest's keys" in lines
    assert "note has no effect: it is not one of the contest's keys" in lines


def test_the_command_line_says_one_line_and_2(tmp_path: Path) -> None:
    def run(path: Path, *more: str) -> tuple[int, list[str]]:
        done = CliRunner().invoke(app, ["serve", "--config", str(path), "--port", "0", *more])
        return done.exit_code, done.stderr.splitlines()

    code, lines = run(write(tmp_path, {"model_config": {"decode_batch_size": [4]}}))
    assert code == 2
    assert lines[-1].endswith("names no model; add model_config.model_cfg_path, or give --model")
    model = {"load_checkpoint": str(demo_model_path())}
    code, lines = run(write(tmp_path, CONTEST, model, tokenizer__vocab_file=str(demo_model_path() / "tokenizer.model")))
    assert code == 2
    assert "seq_length" in lines[-1]
    assert "the model's context of 1024, not 4096" in lines[-1]
    code, lines = run(write(tmp_path, CONTEST, {"load_checkpoint": "gone.ckpt"}))
    assert code == 2
    assert "gone.ckpt: no such file or folder" in lines[-1]


def _offline(prompt: str, count: int) -> str:
    llm = LLM(demo_model_path(), num_threads=1)
    try:
        return llm.generate(prompt, SamplingParams(max_tokens=count))[0].text
    finally:
        llm.close()


def test_a_server_starts_from_the_yaml(tmp_path: Path) -> None:
    """As the contest starts it: a MindSpore checkpoint, relative paths, what is ignored on standard error."""
    (tmp_path / "weights").mkdir()  # nothing else lies beside the checkpoint
    demo = open_checkpoint(demo_model_path())
    write_mindspore_ckpt(tmp_path / "weights" / "demo.ckpt", mindformers_names(demo.tensors))
    shape = {
        "type": "LlamaConfig",
        "vocab_size": demo.config.vocab_size,
        "hidden_size": demo.config.hidden_size,
        "intermediate_size": demo.config.intermediate_size,
        "num_layers": demo.config.num_hidden_layers,
        "num_heads": demo.config.num_attention_heads,
        "n_kv_heads": demo.config.num_key_value_heads,
        "seq_length": 1024,
    }
    path = write(
        tmp_path,
        CONTEST,
        {"load_checkpoint": "../weights/demo.ckpt", "model": {"model_config": shape}},
        model_config__seq_length=[512],
        model_config__decode_batch_size=[4],
        tokenizer__vocab_file=str(demo_model_path() / "tokenizer.model"),
    )
    command = [sys.executable, "-m", "isologit", "serve", "--config", path.name, "--port", "0", "--threads", "1"]
    with server_process(command, cwd=tmp_path, environment={**os.environ, "COLUMNS": "200"}) as server:
        assert f"serving llama_7b on {server.url}" in server.output
        assert f"{path.name}: model_config.prefill_batch_size has no effect: " in server.output
        event = requests.get(f"{server.url}/serving/get_serverd_model_info", timeout=60).text
        assert '"model_id": "llama_7b"' in event
        assert '"max_input_length": 512' in event
        assert '"max_batch_total_tokens": 2048' in event
        body = {"inputs": "Describe the fox.\n", "parameters": {"max_new_tokens": 5, "do_sample": "False"}}
        answer = requests.post(f"{server.url}/models/llama2/generate", json=body, timeout=60).json()
        assert answer["generated_text"] == _offline("Describe the fox.\n", 5)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
