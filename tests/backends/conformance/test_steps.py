"""A backend's own methods, step by step, against transformers in float32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.backends.conformance.batches import Part, make_batch
from tests.backends.conformance.conftest import MAX_MODEL_LEN, VOCAB, Model, tolerance

from isologit.backends.base import Backend, LoadOptions
from isologit.backends.registry import load_backend
from isologit.checkpoints.checkpoint import open_checkpoint


def tokens(count: int, seed: int) -> list[int]:
    return [1, *np.random.default_rng(seed).integers(3, VOCAB, count - 1).tolist()]


def blocks(backend: Backend, count: int, first: int = 0) -> list[int]:
    """Block ids for so many tokens, not in order."""
    return list(range(first + -(-count // backend.block_size) - 1, first - 1, -1))


def test_a_prompt_at_once(model: Model, backend: Backend) -> None:
    prompt = tokens(70, 0)
    output = backend.forward(make_batch([(prompt, 0, blocks(backend, 70))], backend.block_size))
    want = model.rows(prompt)
    assert output.logits.dtype == np.float32
    assert np.abs(output.logits - want).max() < tolerance(backend.describe())
    assert output.argmax.tolist() == want.argmax(1).tolist()
    assert output.final.shape == (70, backend.config.hidden_size)


def test_chunks_drafts_and_single_tokens_in_one_step(model: Model, backend: Backend) -> None:
    """Three sequences, each in pieces of its own sizes, all in the same steps."""
    lengths, cuts = (60, 33, 47), ((0, 25, 26, 60), (0, 31, 32, 33), (0, 1, 41, 47))
    prompts = [tokens(length, seed) for seed, length in enumerate(lengths)]
    owned = [blocks(backend, 64, 20 * i) for i in range(3)]
    found: list[list[np.ndarray]] = [[], [], []]
    for step in range(3):
        parts: list[Part] = [(prompts[i][cuts[i][step] : cuts[i][step + 1]], cuts[i][step], owned[i]) for i in range(3)]
        rows = iter(backend.forward(make_batch(parts, backend.block_size)).logits.copy())
        for i, (fed, _, _) in enumerate(parts):
            found[i] += [next(rows) for _ in fed]
    for prompt, rows_of in zip(prompts, found, strict=True):
        assert np.abs(np.stack(rows_of) - model.rows(prompt)).max() < tolerance(backend.describe())


def test_a_token_does_not_see_what_follows_it(backend: Backend) -> None:
    """The inverse of causality: another last token changes its own row and no earlier one."""
    first, second = tokens(20, 3), [*tokens(20, 3)[:-1], 7]
    rows = [
        backend.forward(make_batch([(t, 0, blocks(backend, 20))], backend.block_size)).logits.copy()
        for t in (first, second)
    ]
    assert np.array_equal(rows[0][:-1], rows[1][:-1])
    assert np.abs(rows[0][-1] - rows[1][-1]).max() > 0.01


def test_only_wanted_rows_give_logits(model: Model, backend: Backend) -> None:
    parts: list[Part] = [(tokens(9, s), 0, blocks(backend, 9, 5 * s)) for s in range(3)]
    batch = make_batch(parts, backend.block_size, num_logits=(1, 0, 3))
    output = backend.forward(replace(batch, logits_wanted=np.array([False, True, False, True])))
    want = np.concatenate([model.rows(parts[0][0])[-1:], model.rows(parts[2][0])[-3:]])
    assert output.argmax.tolist() == want.argmax(1).tolist()
    assert output.logits.shape == (2, VOCAB)
    assert np.abs(output.logits - want[[1, 3]]).max() < tolerance(backend.describe())


def test_a_step_without_logits_rows(model: Model, backend: Backend) -> None:
    prompt = tokens(40, 5)
    owned = blocks(backend, 40)
    silent = backend.forward(make_batch([(prompt[:30], 0, owned)], backend.block_size, num_logits=(0,)))
    assert silent.argmax.shape == (0,)
    output = backend.forward(make_batch([(prompt[30:], 30, owned)], backend.block_size))
    assert np.abs(output.logits - model.rows(prompt)[30:]).max() < tolerance(backend.describe())


def test_project_gives_the_logits_again(backend: Backend) -> None:
    output = backend.forward(make_batch([(tokens(30, 6), 0, blocks(backend, 30))], backend.block_size))
    logits, final = output.logits.copy(), np.stack([output.final[i].copy() for i in (29, 3, 11)])
    again = backend.project(final)
    if backend.describe().get("batch_invariant", True):
        assert np.array_equal(again, logits[[29, 3, 11]])
    assert np.abs(again - logits[[29, 3, 11]]).max() < tolerance(backend.describe())


def test_tokens_that_the_last_step_chooses(model: Model, backend: Backend) -> None:
    """Each step is started before the last one is read, with tokens that only the device knows."""
    if not backend.overlaps_steps:
        pytest.skip("the backend's steps do not overlap")
    prompts = tokens(20, 3), tokens(9, 4)
    own_a, own_b = blocks(backend, 32), blocks(backend, 32, 8)
    steps: list[list[Part]] = [
        [(prompts[0], 0, own_a), (prompts[1], 0, own_b)],
        [([-2], 9, own_b), ([-1], 20, own_a)],  # what rows 1 and 0 of the step before chose
        [([-2], 21, own_a), ([-1], 10, own_b)],
    ]
    batches = [make_batch(step, backend.block_size, num_logits=(1, 1), wanted=False) for step in steps]
    first, second = backend.forward(batches[0]), backend.forward(batches[1])
    chosen = [first.argmax.tolist()]
    logits = backend.project(first.final.copy())  # while the second step runs, whose results stay
    third = backend.forward(batches[2])
    chosen += [second.argmax.tolist()[::-1], third.argmax.tolist()]
    assert np.abs(logits - [model.rows(prompt)[-1] for prompt in prompts]).max() < tolerance(backend.describe())
    for i, prompt in enumerate(prompts):
        said = [tokens_of_step[i] for tokens_of_step in chosen]
        assert said == model.rows([*prompt, *said])[len(prompt) - 1 : -1].argmax(1).tolist()


def test_log_normalisers(backend: Backend) -> None:
    output = backend.forward(make_batch([(tokens(12, 7), 0, blocks(backend, 12))], backend.block_size))
    want = torch.from_numpy(output.logits.copy()).double().logsumexp(-1).numpy()
    assert np.abs(backend.log_normalisers(output) - want).max() < 1e-5


def test_rows_do_not_depend_on_their_batch(backend: Backend) -> None:
    """Bit for bit where the backend says so: alone, in pieces, and among others."""
    if not backend.describe().get("batch_invariant", True):
        pytest.skip("the backend does not claim it")
    prompt, size = tokens(50, 8), backend.block_size
    whole = backend.forward(make_batch([(prompt, 0, blocks(backend, 50))], size)).logits.copy()
    owned = blocks(backend, 50, 10)
    pieces = [
        backend.forward(make_batch([(prompt[a:b], a, owned)], size)).logits.copy()
        for a, b in ((0, 20), (20, 21), (21, 29), (29, 50))
    ]
    others: list[Part] = [(tokens(10 + s, 90 + s), 0, blocks(backend, 16, 20 + 2 * s)) for s in range(4)]
    among = backend.forward(make_batch([*others, (prompt, 0, owned)], size)).logits.copy()
    assert np.array_equal(np.concatenate(pieces), whole)
    assert np.array_equal(among[-50:], whole)


def test_not_a_number_is_said_so(model: Model, backend_name: str, backend: Backend) -> None:
    checkpoint = open_checkpoint(model.folder)
    broken = {name: checkpoint.tensors[name] for name in checkpoint.tensors}
    broken["model.norm.weight"] = torch.full_like(broken["model.norm.weight"], torch.nan)
    options = LoadOptions(max_model_len=MAX_MODEL_LEN, num_threads=1)
    other = load_backend(replace(checkpoint, tensors=broken), options, backend=backend_name)
    other.allocate_kv(4)
    other.reserve(16)
    output = other.forward(make_batch([(tokens(5, 1), 0, blocks(backend, 5))], backend.block_size, wanted=False))
    assert output.argmax.tolist() == [-1] * 5
    other.close()


def test_memory_is_what_was_planned(backend: Backend, backend_name: str) -> None:
    options = LoadOptions(max_model_len=MAX_MODEL_LEN, num_threads=1)
    assert type(backend).plan_memory(backend.config, options, 128) == backend.memory()
    assert backend.free_memory() > 0
    assert backend.name == backend_name
    said = backend.describe()
    assert {"device", "kernels", "compute_dtype", "weights_dtype", "weight_bytes", "step_bytes"} <= set(said)
