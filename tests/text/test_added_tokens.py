"""Tokens that the files beside a tokenizer add have the ids and the reach that transformers gives them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.text.tokenizer_files import as_tokenizers, train_byte_level, train_sentencepiece
from tokenizers import AddedToken
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from isologit.errors import ModelError
from isologit.text.detokenizer import Detokenizer
from isologit.text.tokenizer import Tokenizer, load_tokenizer

PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
IM_START = {"content": "<|im_start|>", "special": True, **PLAIN}
IM_END = {"content": "<|im_end|>", "special": True, **PLAIN}
TOOL = {"content": "<tool>", "special": False, **PLAIN}
LEFT = {"content": "<left>", "special": False, **PLAIN, "lstrip": True}
RIGHT = {"content": "<right>", "special": True, **PLAIN, "rstrip": True}
BOTH = {"content": "<|im", "special": False, **PLAIN, "lstrip": True, "rstrip": True}
DECODER = {str(380 + i): token for i, token in enumerate((IM_START, IM_END, TOOL, LEFT, RIGHT, BOTH))} | {
    str(i): {"content": name, "special": True, **PLAIN} for i, name in enumerate(("<unk>", "<s>", "</s>"))
}
CONFIG = {"added_tokens_decoder": DECODER, "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
TEXTS = [
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "the dog<tool>the dog <tool> the dog",
    "a <left> b<left>c  <right>  d<right>e",
    "<|im end<|im_e <|im <|im_end|>",
    "</s> hi <s>[INST]",
    "<tool>",
    "the <tool><right>",
    "x<unk>y",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_sentencepiece(folder / "tokenizer.model")
    as_tokenizers(folder / "tokenizer.model").save(str(folder / "tokenizer.json"))
    return folder


def opened(source: Path, folder: Path, kind: str, config: dict[str, Any], **files: Any) -> Tokenizer:
    """The tokenizer of a folder with one vocabulary, this `tokenizer_config.json`, and JSON files by stem."""
    folder.mkdir(exist_ok=True)
    shutil.copy(source / kind, folder)
    for name, content in {"tokenizer_config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def llama_tokenizer(trained: Path, **options: Any) -> LlamaTokenizer:
    """transformers' own LLaMA tokenizer over the same vocabulary."""
    model = json.loads((trained / "tokenizer.json").read_text())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    added = {int(i): AddedToken(**token) for i, token in DECODER.items()}
    names = {"eos_token": "<|im_end|>"}
    return LlamaTokenizer(vocab=model["vocab"], merges=merges, added_tokens_decoder=added, **names, **options)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_beside_tokenizer_json(trained: Path, tmp_path: Path, text: str) -> None:
    ours = opened(trained, tmp_path, "tokenizer.json", CONFIG)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = ours.encode_without_bos(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.vocab_size, ours.eos_token_id, ours.bos_token_id) == (len(theirs), 381, 1)


# transformers drops one of the spaces that a stretch of text begins with; SentencePiece, the original, keeps it
NO_SPACES = [re.sub(r"(?<=>) ", "", text) for text in TEXTS]


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("text", NO_SPACES)
def test_ids_beside_tokenizer_model(trained: Path, tmp_path: Path, text: str, legacy: bool | None) -> None:
    config = CONFIG if legacy is None else {**CONFIG, "legacy": legacy}
    ours = opened(trained, tmp_path, "tokenizer.model", config)
    theirs = llama_tokenizer(trained, legacy=legacy is not False)
    ids = ours.encode_without_bos(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.vocab_size, ours.eos_token_id, ours.bos_token_id) == (len(theirs), 381, 1)
    detokenizer = Detokenizer(ours)
    assert "".join([*(detokenizer.push(i) for i in ids), detokenizer.finish()]) == ours.decode(ids)


words = st.sampled_from([*(token["content"] for token in DECODER.values()), " ", "\n", "the", "dog", "</s>", "🤗", "x"])


@pytest.mark.parametrize("legacy", [True, False])
@given(parts=st.lists(words, max_size=12))
@settings(max_examples=150, deadline=None)
def test_any_mixture_beside_tokenizer_model(
    trained: Path, tmp_path_factory: pytest.TempPathFactory, legacy: bool, parts: list[str]
) -> None:
    key = f"mixture{legacy}"
    if key not in _OPEN:
        ours = opened(trained, tmp_path_factory.mktemp(key), "tokenizer.model", {**CONFIG, "legacy": legacy})
        _OPEN[key] = ours, llama_tokenizer(trained, legacy=legacy)
    ours, theirs = _OPEN[key]
    text = "".join(parts)
    ids = ours.encode_without_bos(text)
    if not text.startswith(" ") and "> " not in text:
        assert ids == theirs.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(ours)
    assert "".join([*(detokenizer.push(i) for i in ids), detokenizer.finish()]) == ours.decode(ids)


_OPEN: dict[str, tuple[Any, Any]] = {}


def test_no_prefix_space(trained: Path, tmp_path: Path) -> None:
    ours = opened(trained, tmp_path, "tokenizer.model", {**CONFIG, "add_prefix_space": False})
    theirs = llama_tokenizer(trained, add_prefix_space=False)
    for text in (*TEXTS, "the dog", " the dog", "", "  a"):
        ids = ours.encode_without_bos(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_older_files(trained: Path, tmp_path: Path, kind: str) -> None:
    names = {"eos_token": {**IM_END, "content": "<|im_end|>"}, "extra_special_tokens": ["<|im_start|>"]}
    added = {"<|im_end|>": 380, "<tool>": 381, "<|im_start|>": 382}
    ours = opened(trained, tmp_path, kind, {}, special_tokens_map=names, added_tokens=added)
    text = "<|im_start|><tool><|im_end|>"
    ids = ours.encode_without_bos(text)
    assert [i for i in ids if i >= 380] == [382, 381, 380]
    assert ours.special_token_ids >= {380, 382}
    assert 381 not in ours.special_token_ids
    assert ours.eos_token_id == 380
    if kind == "tokenizer.json":
        assert ids == PreTrainedTokenizerFast.from_pretrained(tmp_path).encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_special_tokens_that_only_have_names(trained: Path, tmp_path: Path, kind: str) -> None:
    ours = opened(trained, tmp_path, kind, {"pad_token": "[PAD]", "extra_special_tokens": ["<x>", "he"]})
    ids = ours.encode_without_bos("[PAD]<x>")
    assert [i for i in ids if i >= 380] == [380, 381]
    assert ours.vocab_size == 382
    assert ours.encode_without_bos("he")[-1] in ours.special_token_ids  # a piece before
    if kind == "tokenizer.json":
        assert ids == PreTrainedTokenizerFast.from_pretrained(tmp_path).encode("[PAD]<x>", add_special_tokens=False)


def test_byte_level(tmp_path: Path) -> None:
    train_byte_level(tmp_path / "tokenizer.json")
    size = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"][-1]["id"] + 1
    config = {"added_tokens_decoder": {str(size): IM_END, str(size + 1): TOOL}, "eos_token": "<|im_end|>"}
    ours = opened(tmp_path, tmp_path / "more", "tokenizer.json", config)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "more")
    for text in TEXTS:
        ids = ours.encode_without_bos(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert b"".join(ours.token_bytes(i) for i in ids).decode() == text
    assert ours.eos_token_id == size == theirs.eos_token_id


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"400": IM_END}, r'the added token "<\|im_end\|>" is declared with id 400, but the vocabulary gives it 380'),
        ({"5": IM_END}, "declared with id 5, but the vocabulary gives it 380"),
        ({"380": {**IM_END, "content": "</s>"}}, 'token "</s>" is declared with id 380, but the vocabulary gives it 2'),
        ({"380": {"special": True}}, "a special or added token must be text, not None"),
        ({"380": "<x>", "-1": "<y>"}, "'-1' is not the id of an added token"),
        ({"a": "<x>"}, "'a' is not the id of an added token"),
        (["<x>"], "added_tokens_decoder must be an object"),
    ],
)
def test_refusals_name_the_token(trained: Path, tmp_path: Path, kind: str, decoder: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        opened(trained, tmp_path, kind, {"added_tokens_decoder": decoder})
    assert "\n" not in str(caught.value)
