"""`isologit run`, `compare` and `report` as a user calls them: what is written, printed and returned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tests.cli.conftest import Invoke, read_jsonl, write_jsonl

from isologit.common.memory import FreeMemory
from isologit.text.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
FILES = {"outputs.jsonl", "steps.jsonl", "result.json", "certificate.json", "report.html", "logits"}


def test_a_run_writes_everything_and_says_valid(invoke: Invoke, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = invoke("run", "--dataset", prompts, "--output", out, "--baseline-requests", 3, "--profile")
    assert done.exit_code == 0, done.output
    assert {file.name for file in out.iterdir()} == FILES
    assert "VALID" in done.stdout
    assert "speed-up" in done.stdout
    assert "where the steps' time went" in done.stdout
    result = json.loads((out / "result.json").read_text())
    assert result["baseline"]["requests"] == 3
    assert result["baseline"]["equal_outputs"] == 3
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["verdict"] == "VALID"
    assert certificate["requests"]["rescored"] == 12
    lines = read_jsonl(out / "outputs.jsonl")
    assert [line["id"] for line in lines] == [f"r{i}" for i in range(12)]
    assert {"prompt", "text", "token_ids", "finish_reason", "metrics"} <= lines[0].keys()
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    again = invoke("report", out)
    assert again.exit_code == 0
    assert len((out / "report.html").read_text()) == pytest.approx(len(page), rel=0.01)


def test_json_is_one_object_and_nothing_else(invoke: Invoke, prompts: Path, tmp_path: Path) -> None:
    done = invoke("run", "--dataset", prompts, "--output", tmp_path / "out", "--baseline-requests", 0, "--json")
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["exit_code"] == done.exit_code == 0
    assert found["totals"]["completed"] == 12
    assert found["certificate"]["verdict"] == "VALID"
    wrong = invoke("run", "--dataset", tmp_path / "none", "--output", tmp_path / "out2", "--json")
    assert json.loads(wrong.stdout)["exit_code"] == wrong.exit_code == 2


def test_a_draft_model_drafts_and_the_proof_holds(invoke: Invoke, prompts: Path, model: Path, tmp_path: Path) -> None:
    arguments = ("run", "--dataset", prompts, "--baseline-requests", 0, "--draft-model", model, "--json")
    found = json.loads(invoke(*arguments, "--output", tmp_path / "out").stdout)
    assert found["certificate"]["verdict"] == "VALID"
    assert found["engine"]["draft_model"] == str(model)
    useless = invoke(*arguments, "--output", tmp_path / "out2", "--speculative-tokens", 0)
    assert useless.exit_code == 2
    assert "draft_model" in useless.stdout


def test_the_built_in_job_runs_without_a_single_option(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("run", "--limit", 12, "--json")
    assert json.loads(done.stdout)["certificate"]["verdict"] == "VALID"
    (folder,) = (tmp_path / "runs").iterdir()
    assert {file.name for file in folder.iterdir()} == FILES


def test_alpaca_records_follow_the_contest_rules(invoke: Invoke, tmp_path: Path) -> None:
    records = [
        {"instruction": "Describe the fox.", "input": "", "output": "The fox is red."},
        {"instruction": "Rewrite the sentence", "input": "The fox will walk.", "output": "The fox walked."},
    ]
    file = tmp_path / "alpaca.json"
    file.write_text(json.dumps(records))
    done = invoke("run", "--dataset", file, "--output", tmp_path / "out", "--baseline-requests", 0)
    assert done.exit_code == 0, done.output
    lines = read_jsonl(tmp_path / "out" / "outputs.jsonl")
    assert [line["prompt"] for line in lines] == ["Describe the fox.", "Rewrite the sentence:The fox will walk."]
    assert all(line["finish_reason"] in ("length", "stop") for line in lines)


def test_plain_lines_are_prompts(invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Describe the fox.\n\nList 4 tools.\n")
    done = invoke("run", "--dataset", file, "--output", tmp_path / "o", "--max-new-tokens", 5, "--baseline-requests", 0)
    assert done.exit_code == 0, done.output
    lines = read_jsonl(tmp_path / "o" / "outputs.jsonl")
    assert [line["prompt"] for line in lines] == ["Describe the fox.", "List 4 tools."]


def test_one_bad_request_does_not_stop_the_others(invoke: Invoke, tmp_path: Path) -> None:
    good = {"prompt": "Describe the fox.\n", "max_new_tokens": 6}
    file = write_jsonl(
        tmp_path / "p.jsonl",
        {"id": "a", **good},
        {"id": "b", "prompt": ""},
        {"id": "c", **good, "max_new_tokens": 0},
        {"id": "d", "prompt": "x", "max_new_tokens": 5000},
        {"id": "e", **good, "max_new_tokens": -3},
        {"id": "f", "prompt_token_ids": [5000]},
        {"id": "g", **good},
    )
    with file.open("a") as lines:
        lines.write('{"id": "h", broken\n')
    done = invoke("run", "--dataset", file, "--output", tmp_path / "out", "--baseline-requests", 0)
    assert done.exit_code == 3, done.output
    assert "6 requests have no answer" in done.output
    found = {line["id"]: line for line in read_jsonl(tmp_path / "out" / "outputs.jsonl")}
    assert list(found)[:7] == list("abcdefg")
    assert len(found) == 8
    assert {name for name, line in found.items() if line["error"]} == {*found} - {"a", "g"}
    assert found["a"]["token_ids"] == found["g"]["token_ids"] != []
    assert "empty" in found["b"]["error"]
    assert "context length is 1024" in found["d"]["error"]
    assert "malformed JSON" in found["7"]["error"]
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["verdict"] == "VALID"


def test_contest_files_have_the_contest_names_and_compare(invoke: Invoke, prompts: Path, tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "long.jsonl",
        *({"id": str(i), "prompt": f"Count from {i + 1} to 70.\n", "max_new_tokens": 130} for i in range(3)),
    )
    for name, slots in (("a", 1), ("b", 3)):
        done = invoke(
            "run", "--dataset", file, "--output", tmp_path / name, "--save-logits", "contest",
            "--max-num-seqs", slots, "--baseline-requests", 0,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
    saved = sorted((tmp_path / "a" / "logits").glob("*.npy"))
    assert len(saved) >= 3
    assert all(int(path.stem.rsplit("_", 1)[1]) % 100 == 0 for path in saved)
    array = np.load(saved[0])
    assert array.dtype == np.float32
    assert array.shape[-1] == 1024
    assert invoke("compare", tmp_path / "a", tmp_path / "b").exit_code == 0
    assert invoke("compare", tmp_path / "a", tmp_path / "b", "--contest-rtol", "--json").exit_code == 0
    array[..., 7] += 0.02
    np.save(saved[0], array)
    wrong = invoke("compare", tmp_path / "a", tmp_path / "b")
    assert wrong.exit_code == 1
    assert saved[0].stem.rsplit("_", 1)[1] in wrong.stdout
    assert "7" in wrong.stdout
    saved[1].unlink()
    assert invoke("compare", tmp_path / "a", tmp_path / "b").exit_code == 1
    assert invoke("compare", tmp_path / "a", tmp_path / "none").exit_code == 2
    assert invoke("compare", tmp_path / "a", tmp_path / "b", "--atol", "-1").exit_code == 2


def test_replay_forces_what_was_recorded(invoke: Invoke, prompts: Path, tmp_path: Path) -> None:
    record = write_jsonl(
        tmp_path / "record.jsonl",
        *({"id": f"r{i}", "prompt": "Describe the fox.\n", "token_ids": [5 + i, 9, 11]} for i in range(12)),
    )
    done = invoke(
        "run", "--dataset", prompts, "--replay", record, "--output", tmp_path / "b", "--baseline-requests", 2, "--json"
    )
    found = json.loads(done.stdout)
    assert done.exit_code == 0, found
    assert found["mode"] == "replay"
    assert found["baseline"]["equal_outputs"] == 2
    lines = read_jsonl(tmp_path / "b" / "outputs.jsonl")
    assert [line["token_ids"] for line in lines] == [[5 + i, 9, 11] for i in range(12)]
    certificate = json.loads((tmp_path / "b" / "certificate.json").read_text())
    assert certificate["verdict"] == "VALID"
    assert not certificate["greedy"]["checked"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the contest's data is not here")
def test_replay_of_the_contest_answers_gives_their_texts(invoke: Invoke, tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu", "bos_token_id": 1,
        "eos_token_id": 2, "torch_dtype": "float16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    answers = SHARED / "alpaca_contest_first1000_answers.jsonl"
    done = invoke(
        "run", "--load-format", "dummy", "--model", tmp_path / "config.json", "--tokenizer", SHARED / "llama_tokenizer",
        "--dataset", SHARED / "alpaca_contest_first1000.json", "--replay", answers, "--limit", 40,
        "--output", tmp_path / "out", "--baseline-requests", 0,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    lines = read_jsonl(tmp_path / "out" / "outputs.jsonl")
    recorded = read_jsonl(answers)[:40]
    assert [line["text"] for line in lines] == [record["llama2_7b_text"] for record in recorded]


def test_the_plan_alone_loads_nothing_and_ends(invoke: Invoke, prompts: Path, tmp_path: Path) -> None:
    done = invoke("run", "--dataset", prompts, "--output", tmp_path / "out", "--plan-only")
    assert done.exit_code == 0, done.output
    assert "keys and values" in done.stdout
    assert "peak " in done.stdout
    assert not (tmp_path / "out").exists()
    found = json.loads(invoke("run", "--dataset", prompts, "--plan-only", "--json").stdout)
    assert found["refusal"] is None
    assert set(found["stages"]) == {"load", "run", "baseline", "certificate"}


def test_a_model_that_does_not_fit_is_refused_in_one_line_before_anything_is_loaded(
    invoke: Invoke, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isologit.job.preview.free_memory", lambda: FreeMemory(1 << 20, "the control group"))
    monkeypatch.setattr("isologit.job.preview.resident_bytes", lambda: 0)  # not what other tests left behind
    monkeypatch.setattr("isologit.job.run.load_engine", None)
    done = invoke("run", "--dataset", prompts, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert "the control group allows" in done.output
    assert "free " in done.output
    assert done.output.count("error:") == 1
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_certified_again(invoke: Invoke, prompts: Path, tmp_path: Path) -> None:
    assert invoke("run", "--dataset", prompts, "--output", tmp_path / "out", "--baseline-requests", 0).exit_code == 0
    done = invoke("certify", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("VALID.")
    lines = (tmp_path / "out" / "outputs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "outputs.jsonl").write_text("".join(lines[1:]))
    done = invoke("certify", tmp_path / "out", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["verdict"] == "INVALID"
    assert invoke("certify", tmp_path).exit_code == 2


def test_one_prompt_whose_logits_are_nan_fails_alone(
    invoke: Invoke, model: Path, tmp_path: Path, prompts: Path
) -> None:
    """The embedding of one token is NaN; the prompt that holds it is the only one that fails."""
    tensors = load_file(model / "model.safetensors")
    lines = read_jsonl(prompts)[:4]
    tokenizer = load_tokenizer(model)
    assert tokenizer is not None
    token = tokenizer.encode("&")[-1]
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    lines[2]["prompt"] = "Describe the fox &"
    file = write_jsonl(tmp_path / "p.jsonl", *lines)
    done = invoke("run", "--model", model, "--dataset", file, "--output", tmp_path / "out", "--baseline-requests", 0)
    assert done.exit_code == 1, done.output
    found = {line["id"]: line for line in read_jsonl(tmp_path / "out" / "outputs.jsonl")}
    assert found["r2"]["finish_reason"] == "error"
    assert "NaN" in found["r2"]["error"]
    assert all(found[name]["finish_reason"] in ("length", "stop") for name in ("r0", "r1", "r3"))
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert "failed_requests" in [reason["code"] for reason in certificate["reasons"]]
