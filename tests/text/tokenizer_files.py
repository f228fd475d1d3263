"""Small tokenizers made on the spot, for tests."""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "def main():\n    return 'hello world'  # two  spaces",
    "Grüße aus Köln; déjà vu; 12345 67890.",
    "the theory of the thing is that the others gather there",
] * 5


def train_sentencepiece(file: Path, *, like_llama: bool = True) -> None:
    """A BPE model with byte fallback; `like_llama` keeps text as it is, else runs of spaces are merged."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=380,
        character_coverage=0.98,
        byte_fallback=True,
        normalization_rule_name="identity" if like_llama else "nmt_nfkc",
        remove_extra_whitespaces=not like_llama,
        allow_whitespace_only_pieces=like_llama,
        minloglevel=2,
    )
    file.write_bytes(model.getvalue())


def as_tokenizers(model_file: Path) -> Tokenizer:
    """The same vocabulary for the tokenizers library, set up as LLaMA-2's `tokenizer.json` is."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    splits = [
        (-sp.get_score(i), piece[:cut], piece[cut:])
        for piece, i in vocab.items()
        if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i))
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges = [(left, right) for _, left, right in sorted(splits, key=lambda split: split[0])]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=None, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def train_byte_level(file: Path) -> None:
    """A byte-level BPE as of LLaMA-3: every token stands for bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<extra token>"])  # not special: decodes to its own text
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair=None, special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer.save(str(file))
