"""What is wrong with a request is told in a line that names the cause: its key, its headers, its body, its names."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from tests.server.conftest import NAME, Running, running
from tests.server.test_limits import reason
from tests.server.tools import PROMPT, SPOKEN, Spoken

from isologit.errors import ConfigError
from isologit.server.fields import WARNING_HEADER
from isologit.server.options import ServerOptions

every_dialect = pytest.mark.parametrize("spoken", SPOKEN, ids=lambda spoken: spoken.name)
JSON = "application/json"
GOOD = json.dumps({"model": NAME, "prompt": PROMPT, "inputs": PROMPT, "max_tokens": 2}).encode()


@every_dialect
@pytest.mark.parametrize(
    ("headers", "content", "status", "words"),
    [
        ({}, GOOD, 415, "has no Content-Type"),
        ({"content-type": "text/plain"}, GOOD, 415, "'text/plain'"),
        ({"content-type": "application/x-www-form-urlencoded"}, GOOD, 415, "x-www-form-urlencoded"),
        ({"content-type": JSON, "content-encoding": "gzip"}, gzip.compress(GOOD), 415, "gzip"),
        ({"content-type": JSON, "content-encoding": "br"}, GOOD, 415, "Content-Encoding br"),
        ({"content-type": JSON}, gzip.compress(GOOD), 400, "compressed with gzip"),
        ({"content-type": f"{JSON}; charset=utf-16"}, GOOD.decode().encode("utf-16"), 415, "charset is utf-16"),
        ({"content-type": f"{JSON}; charset=latin-1"}, GOOD, 415, "UTF-8"),
        ({"content-type": JSON}, '{"prompt": "é"}'.encode("latin-1"), 400, "byte 0xe9 at position 12"),
        ({"content-type": JSON}, GOOD.decode().encode("utf-16"), 400, "not UTF-8"),
        ({"content-type": JSON}, b"", 400, "the body is empty"),
        ({}, b"", 400, "the body is empty"),
        ({"content-type": JSON}, b" \n", 400, "line 2 column 1"),
        ({"content-type": JSON}, b'{"prompt": "a",\n "n": }', 400, "line 2 column 7 (character 22)"),
        ({"content-type": JSON}, b"{'prompt': 'a'}", 400, "column 2"),
        ({"content-type": JSON}, b"[]", 400, "an array"),
        ({"content-type": JSON}, b'"text"', 400, "a string"),
        ({"content-type": JSON}, b"null", 400, "null"),
        ({"content-type": JSON}, b"NaN", 400, "a number"),
        ({"content-type": JSON}, b"1" * 5000, 400, "too many digits"),
        ({"content-type": JSON}, b"[" * 100_000, 400, "nested too deeply"),
    ],
)
def test_a_body_that_is_no_json_object_is_told_why(
    http: httpx.Client, spoken: Spoken, headers: dict[str, str], content: bytes, status: int, words: str
) -> None:
    answer = http.post(spoken.whole_path, content=content, headers=headers)
    assert answer.status_code == (422 if spoken.name == "tgi" and status == 400 else status)
    assert words in reason(answer)


@every_dialect
@pytest.mark.parametrize("kind", [JSON, "application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"'])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a mark"])
def test_json_is_read_however_it_is_labelled(http: httpx.Client, spoken: Spoken, kind: str, start: bytes) -> None:
    path, body = spoken.request(tokens=2)
    answer = http.post(path, content=start + json.dumps(body).encode(), headers={"content-type": kind})
    assert answer.status_code == 200
    assert WARNING_HEADER not in answer.headers


def test_a_field_that_is_missing_or_wrong_is_named(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"model": NAME})
    assert reason(answer) == "prompt: Field required"
    assert answer.json()["error"]["param"] == "prompt"
    answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "n": "x"})
    assert answer.json()["error"]["param"] == "n"


# -- the key ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with running(ServerOptions(api_key="sesame", allowed_origins=("https://a.example",))) as found:
        yield found


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_the_schemes_name_is_known_in_any_case(locked: Running, scheme: str) -> None:
    found = httpx.get(f"{locked.url}/v1/models", headers={"authorization": f"{scheme} sesame"})
    assert found.status_code == 200


@pytest.mark.parametrize("given", ["", "Basic sesame", "bearersesame", "bearer Sesame", "Bearer sésame"])
def test_without_the_key_the_answer_says_which_scheme_is_wanted(locked: Running, given: str) -> None:
    found = httpx.get(f"{locked.url}/v1/models", headers={"authorization": given.encode("latin-1")})
    assert found.status_code == 401
    assert found.headers["www-authenticate"] == "Bearer"


# -- pages in a browser -----------------------------------------------------------------------------------------------

ASKING = {
    "origin": "https://a.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type",
}


def test_a_browser_asks_without_the_key_and_reads_what_it_gets(locked: Running) -> None:
    asked = httpx.options(f"{locked.url}/v1/completions", headers=ASKING)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == "https://a.example"
    assert "authorization" in asked.headers["access-control-allow-headers"].lower()
    for key, status in (("sesame", 200), ("wrong", 401)):  # errors can be read as well
        found = httpx.post(
            f"{locked.url}/v1/completions",
            json={"prompt": PROMPT, "max_tokens": 2, "stream": True},
            headers={"origin": "https://a.example", "authorization": f"Bearer {key}"},
            timeout=60,
        )
        assert found.status_code == status
        assert found.headers["access-control-allow-origin"] == "https://a.example"


def test_other_origins_and_servers_without_the_option_allow_nothing(locked: Running, server: Running) -> None:
    other = {**ASKING, "origin": "https://b.example"}
    found = httpx.options(f"{locked.url}/v1/completions", headers=other)
    assert found.status_code == 400
    assert "access-control-allow-origin" not in found.headers
    assert httpx.options(f"{locked.url}/v1/completions").status_code == 401
    assert httpx.options(f"{server.url}/v1/completions", headers=ASKING).status_code == 405


def test_every_origin_may_be_allowed(start: Callable[..., Running]) -> None:
    found = httpx.options(f"{start(allowed_origins=('*',)).url}/generate", headers=ASKING)
    assert found.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", ["", "a.example", "https://a.example/path", "[]"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-origins"):
        ServerOptions(allowed_origins=(origin,))


# -- names and codes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tgi", "dummy", "llama2", NAME, None])
def test_names_that_clients_send_are_served(http: httpx.Client, name: str | None) -> None:
    model = {} if name is None else {"model": name}
    found = http.post("/v1/completions", json={**model, "prompt": PROMPT, "max_tokens": 2}).raise_for_status().json()
    assert found["model"] == name or (name is None and found["model"] == NAME)
    chat = {**model, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    assert http.post("/v1/chat/completions", json=chat).status_code == 200
    assert http.post("/v1/completions", json={"model": "gpt-4", "prompt": PROMPT}).status_code == 404
    assert {model["id"] for model in http.get("/v1/models").json()["data"]} == {NAME, "llama2", "internlm"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_has_the_code_that_clients_look_for(server: Running, stream: bool) -> None:
    limit = server.service.limits.max_model_len
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        for ask in (
            lambda: client.completions.create(model=NAME, prompt="fox " * limit, max_tokens=7, stream=stream),
            lambda: client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "fox " * limit}], max_tokens=7, stream=stream
            ),
            lambda: client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "fox " * limit}], stream=stream
            ),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                ask()
            assert caught.value.code == "context_length_exceeded"
            assert f"This model's maximum context length is {limit} tokens. However, you requested" in str(caught.value)
    found = httpx.post(f"{server.url}/generate", json={"inputs": "fox " * limit})
    assert found.status_code == 422
    assert f"`inputs` tokens + `max_new_tokens` must be <= {limit}. Given:" in found.json()["error"]


def test_ping_and_version(server: Running, locked: Running) -> None:
    assert httpx.get(f"{server.url}/ping").status_code == httpx.post(f"{server.url}/ping").status_code == 200
    assert httpx.get(f"{locked.url}/ping").status_code == 200
    assert httpx.get(f"{server.url}/version").json()["version"]


# -- /tokenize and /detokenize ----------------------------------------------------------------------------------------

TEXT = "Describe the fox 🦊.\n"


def test_tokens_of_a_prompt_and_back(http: httpx.Client, server: Running) -> None:
    tokenizer = server.service.tokenizer
    found = http.post("/tokenize", json={"model": NAME, "prompt": TEXT, "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer.encode(TEXT)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == server.service.limits.max_model_len
    bare = http.post("/tokenize", json={"prompt": TEXT, "add_special_tokens": False}).json()
    assert bare["tokens"] == tokenizer.encode_without_bos(TEXT)
    assert bare["token_strs"] is None
    assert http.post("/detokenize", json={"tokens": bare["tokens"]}).json() == {"prompt": TEXT}
    begin = tokenizer.token_name(found["tokens"][0])
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"] in (
        f"{begin}{TEXT}",
        f"{begin} {TEXT}",
    )
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_tokens_of_a_conversation_are_those_that_chat_counts(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Describe the fox."}]
    usage = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()["usage"]
    assert http.post("/tokenize", json={"messages": messages}).json()["count"] == usage["prompt_tokens"]


def test_tgis_tokens_say_where_they_stand(http: httpx.Client, server: Running) -> None:
    found = http.post("/tokenize", json={"inputs": TEXT}).json()
    assert [token["id"] for token in found] == server.service.tokenizer.encode(TEXT)
    assert (found[0]["start"], found[0]["stop"]) == (0, 0)
    assert "".join(TEXT[token["start"] : token["stop"]] for token in found) == TEXT
    assert found[-1]["stop"] == len(TEXT)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "inputs": "a"}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"prompt": "a", "model": "gpt-4"}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ 1 }}"}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [99999]}),
        ("/detokenize", {"tokens": [-1]}),
    ],
)
def test_wrong_questions_about_tokens_are_refused(http: httpx.Client, path: str, wrong: dict[str, Any]) -> None:
    answer = http.post(path, json=wrong)
    assert 400 <= answer.status_code < 500
    assert reason(answer)


def test_head_is_answered_as_get_without_the_body(http: httpx.Client) -> None:
    for path in ("/health", "/ping", "/info", "/v1/models", "/metrics"):
        head, get = http.head(path), http.get(path)
        assert head.status_code == get.status_code == 200
        assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    assert http.head("/generate").status_code == 405
