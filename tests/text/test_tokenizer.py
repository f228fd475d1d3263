"""Tokenizers against the libraries they stand on and each other; text that comes piece by piece is the whole text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.text.tokenizer_files import CORPUS, as_tokenizers, train_byte_level, train_sentencepiece
from transformers import PreTrainedTokenizerFast

from isologit.errors import ModelError, RequestError
from isologit.text.detokenizer import Detokenizer
from isologit.text.tokenizer import Tokenizer, load_tokenizer

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"
KINDS = ("sentencepiece", "merging spaces", "json", "byte level")
TEXTS = [*CORPUS[:4], "hi 🤗🎉 ok", "  two  spaces ", "", "déjà", "日本語\n\ttab", "a<0x41>b"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    result = {kind: root / kind for kind in KINDS}
    for folder in result.values():
        folder.mkdir()
    train_sentencepiece(result["sentencepiece"] / "tokenizer.model")
    train_sentencepiece(result["merging spaces"] / "tokenizer.model", like_llama=False)
    as_tokenizers(result["sentencepiece"] / "tokenizer.model").save(str(result["json"] / "tokenizer.json"))
    train_byte_level(result["byte level"] / "tokenizer.json")
    return result


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    result = {}
    for kind, folder in folders.items():
        tokenizer = load_tokenizer(folder)
        assert tokenizer is not None
        result[kind] = tokenizer
    return result


# -- encoding and decoding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sentencepiece", "json", "byte level"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(loaded: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = loaded[kind]
    ids = tokenizer.encode(text)
    assert ids == [tokenizer.bos_token_id, *tokenizer.encode_without_bos(text)]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", [*TEXTS, "<s>[INST] hi </s> <s>", " <unk>x"])
def test_both_file_kinds_give_the_same_ids(loaded: dict[str, Tokenizer], text: str) -> None:
    if text != "a<0x41>b":  # as written it is text to SentencePiece, but the library's vocabulary look-up may join it
        assert loaded["sentencepiece"].encode(text) == loaded["json"].encode(text)


@pytest.mark.parametrize(("kind", "bos", "eos"), [("json", "<s>", "</s>"), ("byte level", "<|begin_of_text|>", None)])
def test_same_as_transformers(
    folders: dict[str, Path], loaded: dict[str, Tokenizer], kind: str, bos: str, eos: str | None
) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folders[kind] / "tokenizer.json"), bos_token=bos, eos_token=eos)
    ours = loaded[kind]
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == (ids[:-1] if eos else ids)
        assert ours.encode_without_bos(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id


def test_what_a_tokenizer_knows(loaded: dict[str, Tokenizer]) -> None:
    for kind in ("sentencepiece", "json"):
        tokenizer = loaded[kind]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (1, 2, 380)
        assert tokenizer.special_token_ids == {0, 1, 2}
    byte_level = loaded["byte level"]
    assert (byte_level.bos_token_id, byte_level.eos_token_id, byte_level.special_token_ids) == (0, 1, {0, 1})


@pytest.mark.parametrize("kind", KINDS)
def test_decode_skips_special_and_unknown_ids(loaded: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = loaded[kind]
    ids = tokenizer.encode_without_bos("the dog")
    outside = [tokenizer.vocab_size, -1, 10**9, *tokenizer.special_token_ids]
    assert tokenizer.decode([*outside, *ids, *outside]) == tokenizer.decode(ids) == "the dog"
    assert tokenizer.decode(outside) == tokenizer.decode([]) == ""


def test_only_the_first_space_is_stripped(loaded: dict[str, Tokenizer]) -> None:
    for kind in ("sentencepiece", "json"):
        tokenizer = loaded[kind]
        dog = tokenizer.encode_without_bos("dog")
        assert tokenizer.decode(dog + dog) == "dog dog"
        space = tokenizer.encode_without_bos(" dog")
        assert tokenizer.decode(space) == " dog"


@pytest.mark.parametrize("kind", ["sentencepiece", "json", "byte level"])
def test_bytes_of_tokens_join_to_the_text(loaded: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = loaded[kind]
    for text in TEXTS:
        joined = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode_without_bos(text))
        start = b"" if kind == "byte level" or not text else b" "  # the space that stands for the start of the text
        assert joined == start + text.encode()


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_has_bytes_and_a_name(loaded: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = loaded[kind]
    for token_id in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(token_id)
        assert data
        assert tokenizer.token_name(token_id)
        if tokenizer.is_text(token_id):
            assert tokenizer.inner_text([token_id]) == data.decode(errors="replace")
        else:
            assert data == tokenizer.token_name(token_id).encode()
    for outside in (-1, tokenizer.vocab_size, 10**9):
        assert (tokenizer.token_bytes(outside), tokenizer.token_name(outside)) == (b"", "")


# -- one token at a time --------------------------------------------------------------------------------------------


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_are_the_whole(loaded: dict[str, Tokenizer], kind: str, data: st.DataObject) -> None:
    tokenizer = loaded[kind]
    spaces = tokenizer.encode_without_bos("  a")
    one_id = st.one_of(
        st.integers(-1, tokenizer.vocab_size + 1),
        st.integers(3, 258),  # byte tokens of the SentencePiece vocabularies
        st.sampled_from([3 + byte for byte in b"\xf0\x9f\xa4\x97\xe4\xbd\xc3\xa9\x20\xff\xed\xa0\x80"]),
        st.sampled_from(spaces),
    )
    ids = data.draw(st.lists(one_id, max_size=24))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_pieces_of_real_text(loaded: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = loaded[kind]
    ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_text_comes_as_soon_as_it_is_complete(loaded: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = loaded[kind]
    ids = tokenizer.encode_without_bos("ok🤗🎉")
    given_so_far = [piece for piece in pieces(tokenizer, ids)[:-1] if piece]
    assert given_so_far[-2:] == ["🤗", "🎉"]


def test_half_a_character_is_held_back(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["sentencepiece"]
    half = [3 + byte for byte in "🤗".encode()[:3]]
    assert pieces(tokenizer, half) == ["", "", "", "���"]
    assert pieces(tokenizer, [*half, *tokenizer.encode_without_bos("a")])[-1] != "���"


def test_the_window_does_not_grow(loaded: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = loaded["sentencepiece"]
    sizes: list[int] = []
    plain = tokenizer._decode

    def watched(token_ids: list[int]) -> str:
        sizes.append(len(token_ids))
        return plain(token_ids)

    monkeypatch.setattr(tokenizer, "_decode", watched)
    ids = tokenizer.encode("the dog 🤗 " * 200) + [3 + 0xFF] * 500 + [3 + 0xE4] * 500
    "".join(pieces(tokenizer, ids))
    assert max(sizes) <= 5


# -- files ----------------------------------------------------------------------------------------------------------


def test_where_a_tokenizer_is_found(folders: dict[str, Path], tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    shutil.copy(folders["sentencepiece"] / "tokenizer.model", tmp_path)
    (tmp_path / "llama.ckpt").touch()
    for path in (tmp_path, str(tmp_path), tmp_path / "tokenizer.model", tmp_path / "llama.ckpt"):
        tokenizer = load_tokenizer(path)
        assert tokenizer is not None
        assert tokenizer.byte_mode == "each"
    shutil.copy(folders["json"] / "tokenizer.json", tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(path)
        assert tokenizer is not None
        assert tokenizer.byte_mode == "run"


@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
def test_tokenizer_config_decides_about_bos(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    shutil.copytree(folders[kind], tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "bos_token": {"content": "<s>"}}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.bos_token_id == 1
    assert tokenizer.encode("the dog") == tokenizer.encode_without_bos("the dog")


def test_saved_padding_and_truncation_are_dropped(folders: dict[str, Path], tmp_path: Path) -> None:
    d = json.loads((folders["json"] / "tokenizer.json").read_text())
    d["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(d))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"garbage", "tokenizer.model: is not a SentencePiece model .*; copy it again"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tokenizer.model: is a tiktoken vocabulary.*add the tokenizer.json"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git lfs pull"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git lfs pull"),
        ("tokenizer.json", b"{}", "tokenizer.json: is not a tokenizers file .*; copy it again"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json: is not a tokenizers file"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "tokenizer.model", "tokenizer.json"])
def test_missing_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}: no such file or folder"):
        load_tokenizer(tmp_path / name)


# -- chat templates -------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}\n[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MESSAGES = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "yes"}]


def with_template(folder: Path, template: Any, tmp_path: Path) -> Tokenizer:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_same_prompt_as_transformers(
    folders: dict[str, Path], kind: str, add_generation_prompt: bool, tmp_path: Path
) -> None:
    file = str(folders["json"] / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt)
    tokenizer = with_template(folders[kind], TEMPLATE, tmp_path)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=add_generation_prompt)
    assert prompt == expected
    assert tokenizer.encode_without_bos(prompt) == theirs.encode(prompt, add_special_tokens=False)


def test_where_a_template_is_found(folders: dict[str, Path], tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ messages[0].content | tojson }}"}]
    folder = folders["sentencepiece"]
    assert with_template(folder, named, tmp_path).apply_chat_template(MESSAGES) == '" hi "'
    (tmp_path / "chat_template.jinja").write_text("{{ messages[1].content }}{{ strftime_now('%%') }}")
    assert with_template(folder, named, tmp_path).apply_chat_template(MESSAGES) == "yes%"


def test_templates_that_do_not_work(folders: dict[str, Path], loaded: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the model has no chat template; give a plain prompt"):
        loaded["sentencepiece"].apply_chat_template(MESSAGES)
    folder = folders["sentencepiece"]
    with pytest.raises(ModelError, match="the chat template is malformed"):
        with_template(folder, "{% if %}", tmp_path).apply_chat_template(MESSAGES)
    with pytest.raises(RequestError, match="does not accept these messages: no system role"):
        with_template(folder, TEMPLATE, tmp_path).apply_chat_template([{"role": "system", "content": "x"}])
    with pytest.raises(RequestError, match="does not accept these messages"):  # the sandbox
        with_template(folder, "{{ messages.append(1) }}", tmp_path).apply_chat_template(MESSAGES)


# -- LLaMA's own vocabulary -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    folder = SHARED_DATA / "llama_tokenizer"
    tokenizer = load_tokenizer(folder) if folder.is_dir() else None
    if tokenizer is None:
        pytest.skip("LLaMA's tokenizer.model is not here")
    return tokenizer


def test_known_ids(llama: Tokenizer) -> None:
    assert llama.vocab_size == 32000
    assert llama.encode("Hello this is a test") == [1, 15043, 445, 338, 263, 1243]
    assert llama.encode("</s> hi <s>[INST]") == [1, 2, 29871, 7251, 29871, 1, 518, 25580, 29962]
    assert llama.decode([1, 15043, 445, 338, 263, 1243, 2]) == "Hello this is a test"


def test_prompts_like_the_tokenizers_library(llama: Tokenizer) -> None:
    file = SHARED_DATA / "alpaca_contest_first1000.json"
    theirs = as_tokenizers(SHARED_DATA / "llama_tokenizer" / "tokenizer.model")
    texts = [item["instruction"] + "\n" + item["input"] for item in json.loads(file.read_text())[:200]]
    for text in texts:
        ids = llama.encode(text)
        assert ids == theirs.encode(text).ids[:-1]
        assert "".join(pieces(llama, ids)) == llama.decode(ids) == text


@given(ids=st.lists(st.one_of(st.integers(0, 32001), st.integers(3, 258)), max_size=30))
@settings(max_examples=100, deadline=None)
def test_pieces_of_random_ids(llama: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(llama, ids)) == llama.decode(ids)
