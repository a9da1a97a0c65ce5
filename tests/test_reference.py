"""Means of z over reference prompts, and the z of one prompt: against plain loops, and through files."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ablation.checks.assertions import assert_identical
from ablation.checks.decoders import FAMILIES, LAYOUTS, VOCABULARY, Decoder, decoders
from ablation.edits import Ablation
from ablation.engine import run
from ablation.errors import InvalidAblation, InvalidPrompt, InvalidResult
from ablation.heads import find_heads
from ablation.hook import HeadAblation
from ablation.imputation import Values
from ablation.reference import Reference, record_z
from tests.surgery import PROMPTS, bare_z, reference
from tests.test_hook import hooks_of, logits

LLAMA = Decoder("llama", num_layers=3, num_heads=4, head_dim=8, num_key_value_groups=2)
PROMPT = (3, 1, 4, 1, 5)
tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6)


@given(decoders((*FAMILIES, *LAYOUTS), ("float32", "float64", "bfloat16"), least_layers=2), tokens)
def test_recorded_z_is_the_input_of_the_projection(decoder: Decoder, prompt: list[int]) -> None:
    found, want = record_z(decoder.shared(), prompt), bare_z(decoder, tuple(prompt))
    assert list(found) == sorted(dict(decoder.heads())) == list(want)
    for layer, z in found.items():
        assert z.dtype == getattr(torch, decoder.dtype) and not z.requires_grad
        assert_identical(z.double(), want[layer], f"z of layer {layer}")


@given(decoders(FAMILIES, least_layers=2), st.lists(tokens, min_size=1, max_size=5))
def test_means_are_those_of_plain_loops(decoder: Decoder, prompts: list[list[int]]) -> None:
    made = Reference.of(decoder.shared(), prompts)
    mean, by_position = made.mean().values, made.mean_by_position().values
    longest = max(map(len, prompts))
    assert made.counts.tolist() == [sum(len(prompt) > at for prompt in prompts) for at in range(longest)]
    for layer, head in decoder.heads():
        z = [bare_z(decoder, tuple(prompt))[layer][:, head].numpy() for prompt in prompts]
        np.testing.assert_allclose(mean[layer][head], np.concatenate(z).mean(axis=0), rtol=0, atol=1e-14)
        for at in range(longest):
            there = np.stack([of for of in (rows[at : at + 1] for rows in z) if len(of)])[:, 0]
            np.testing.assert_allclose(by_position[layer][at, head], there.mean(axis=0), rtol=0, atol=1e-14)


@given(st.permutations(range(len(PROMPTS))))
def test_order_of_prompts_changes_no_bit(order: list[int]) -> None:
    other = Reference.of(LLAMA.shared(), [PROMPTS[index] for index in order])
    assert other.sha256 == reference(LLAMA).sha256
    assert other.provenance == reference(LLAMA).provenance
    for layer, values in reference(LLAMA).mean().values.items():
        assert torch.equal(values, other.mean().values[layer])


@given(st.integers(1, len(PROMPTS) - 1))
def test_parts_of_a_reference_add_up(split: int) -> None:
    """However the prompts are split: sums and counts are sums over prompts, up to rounding."""
    parts = [Reference.of(LLAMA.shared(), part) for part in (PROMPTS[:split], PROMPTS[split:])]
    whole = reference(LLAMA)
    counts, sums = torch.zeros_like(whole.counts), {layer: torch.zeros_like(z) for layer, z in whole.sums.items()}
    for part in parts:
        counts[: len(part.counts)] += part.counts
        for layer, z in part.sums.items():
            sums[layer][: len(z)] += z
    assert torch.equal(counts, whole.counts)
    for layer, z in whole.sums.items():
        torch.testing.assert_close(sums[layer], z, rtol=0, atol=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_of_one_prompt_by_position_is_its_z(family: str) -> None:
    """Each ablation by it is then the identity, bit for bit."""
    decoder = Decoder(family, num_layers=2, num_heads=2, head_dim=8)
    model, own = decoder.shared(), Reference.of(decoder.shared(), [PROMPT]).mean_by_position()
    for layer, z in record_z(model, PROMPT).items():
        assert torch.equal(own.values[layer].float(), z)
    with HeadAblation(model) as hook:
        clean = logits(model, torch.tensor([PROMPT]))
        hook.ablate(decoder.heads(), own)
        assert_identical(logits(model, torch.tensor([PROMPT])), clean, "the logits with the prompt's own z")


def test_reference_of_one_token_has_equal_means() -> None:
    made = Reference.of(LLAMA.shared(), [(7,)])
    for layer, values in made.mean().values.items():
        assert torch.equal(values, made.mean_by_position().values[layer][0])
    with pytest.raises(InvalidAblation, match="'reference-mean-by-position' end at position 0, the prompt at 4"):
        run(LLAMA.shared(), PROMPT, [Ablation([(0, 1)], made.mean_by_position())])


def test_prompt_that_occurs_twice_counts_twice() -> None:
    one, two = (Reference.of(LLAMA.shared(), [(7, 2), *[PROMPT] * times]) for times in (1, 2))
    assert two.counts.tolist() == [3, 3, 2, 2, 2] and one.counts.tolist() == [2, 2, 1, 1, 1]
    assert one.provenance["prompts_sha256"] != two.provenance["prompts_sha256"]


@pytest.mark.parametrize("make", [np.array, torch.tensor, list, lambda rows: (row for row in rows)])
def test_prompts_may_be_arrays(make: Any) -> None:
    rows = [[3, 1, 4], [1, 5, 9]]
    made = Reference.of(LLAMA.shared(), make(rows))
    assert made.sha256 == Reference.of(LLAMA.shared(), rows).sha256
    assert json.loads(json.dumps(dict(made.provenance))) == made.provenance


def test_provenance_and_progress_of_a_reference() -> None:
    shares: list[float] = []
    made = Reference.of(LLAMA.shared(), PROMPTS, known={"file": "reference.jsonl"}, progress=shares.append)
    assert shares == [0.2, 0.4, 0.6, 0.8, 1.0]
    known = made.provenance
    assert (known["prompts"], known["tokens"], known["file"]) == (5, 28, "reference.jsonl")
    assert {"torch", "transformers"} <= known.keys()


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        ([], "there are no reference prompts"),
        ([[3, 1], []], "a run needs at least one prompt token"),
        ([[3, VOCABULARY]], f"no token {VOCABULARY}"),
        ([[3, -1]], "no token -1"),
        ([[3] * 129], "the prompt has 129 tokens, the model takes at most 128"),
        ([3, 1, 4], "a prompt is a list, not 3"),
        (["Berlin"], "'B' is not a token id: a prompt is one flat list of integers"),
        ([[0.5]], "0.5 is not a token id"),
    ],
)
def test_prompts_that_cannot_be_run_are_refused(prompts: Any, reason: str) -> None:
    with pytest.raises(InvalidPrompt, match=reason):
        Reference.of(LLAMA.shared(), prompts)


def test_models_that_do_not_run_clean_are_refused() -> None:
    """In training mode, or with an ablation: that would be in the means. Nothing is left on the model."""
    model = LLAMA.fresh()
    with pytest.raises(InvalidAblation, match="training mode"):
        record_z(model.train(), PROMPT)
    model.eval()
    with HeadAblation(model) as hook:
        hook.ablate([(0, 1)])
        for _ in range(2):
            with pytest.raises(InvalidAblation, match="the model already carries an ablation"):
                Reference.of(model, [PROMPT])
        logits(model, torch.tensor([PROMPT]))
    assert hooks_of(model) == hooks_of(LLAMA.fresh())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_z_that_is_not_finite_stays_in_its_head(value: float) -> None:
    """The other heads have their means."""
    model = LLAMA.fresh()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.bias[0] = value
    for values in (record_z(model, PROMPT)[1], Reference.of(model, [PROMPT]).mean().values[1][None]):
        assert (~values.isfinite()).any(dim=(0, 2)).tolist() == [True, True, False, False]
    assert hooks_of(model) == hooks_of(LLAMA.fresh())


def test_users_hook_on_the_projection_is_in_the_means() -> None:
    """Its edit is part of the model."""
    model = LLAMA.fresh()
    layer = find_heads(model).layer(1)
    layer.projection.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    shifted, own = record_z(model, PROMPT), record_z(LLAMA.shared(), PROMPT)
    assert torch.equal(shifted[1], own[1] + 1) and torch.equal(shifted[0], own[0])


def test_recorded_z_is_kept_when_a_model_writes_in_place() -> None:
    def zero(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        args[0].zero_()

    model = LLAMA.fresh()
    find_heads(model).layer(1).projection.register_forward_hook(zero)
    assert torch.equal(record_z(model, PROMPT)[1], record_z(LLAMA.shared(), PROMPT)[1])


def test_layers_without_heads_have_no_sums() -> None:
    decoder = Decoder("lfm2", num_layers=4, num_heads=2, head_dim=8)
    made = Reference.of(decoder.shared(), [PROMPT])
    assert list(made.sums) == [1, 3]
    run(decoder.shared(), PROMPT, [Ablation([(1, 0), (3, 1)], made.mean())])


# ---- files


def test_file_of_a_reference_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    path.write_bytes(b"an earlier file")
    reference(LLAMA).save(path)
    loaded = Reference.load(str(path))
    assert loaded.sha256 == reference(LLAMA).sha256 and loaded.provenance == reference(LLAMA).provenance
    assert list(loaded.sums) == [0, 1, 2]
    for name in ("reference-mean", "reference-mean-by-position"):
        one, other = loaded.imputation(name), reference(LLAMA).imputation(name)
        assert one.name == other.name == name
        assert all(torch.equal(values, other.values[layer]) for layer, values in one.values.items())


def test_reference_of_another_model_is_refused() -> None:
    """Of another number of heads, head_dim or layers; before anything runs."""
    for decoder in (LLAMA._replace(num_heads=6), LLAMA._replace(head_dim=4), LLAMA._replace(num_layers=1)):
        for imputation in (reference(decoder).mean(), reference(decoder).mean_by_position()):
            with pytest.raises(InvalidAblation, match="they are of another model|do not include layer 2"):
                run(LLAMA.shared(), PROMPT, [Ablation([(0, 1)]), Ablation([(2, 1)], imputation)])


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arrays: {key: value for key, value in arrays.items() if key != name}


def with_(**arrays: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda before: before | {name.replace("_", "."): np.array(value) for name, value in arrays.items()}


def only(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arrays: {name: arrays[name] for name in names}


DAMAGED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "other file": lambda arrays: {"x": np.zeros(3)},
    "no counts": without("counts"),
    "no provenance": without("provenance"),
    "no layer": only("counts", "provenance"),
    "list": with_(provenance="[]"),
    "no json": with_(provenance="{"),
    "bytes": with_(provenance=b"{}"),
    "float counts": with_(counts=np.ones(8)),
    "int32 counts": with_(counts=np.ones(8, dtype=np.int32)),
    "square counts": with_(counts=np.ones((8, 1), dtype=np.int64)),
    "zero counts": with_(counts=np.zeros(8, dtype=np.int64)),
    "negative counts": with_(counts=np.full(8, -1)),
    "few counts": with_(counts=np.ones(7, dtype=np.int64)),
    "growing counts": with_(counts=np.arange(1, 9)),
    "pickled": with_(layer_1=np.array([{}], dtype=object)),
    "float32": with_(layer_1=np.zeros((8, 4, 8), dtype=np.float32)),
    "complex": with_(layer_1=np.zeros((8, 4, 8), dtype=complex)),
    "flat": with_(layer_1=np.zeros((8, 32))),
    "short": with_(layer_1=np.zeros((7, 4, 8))),
    "name": with_(layer_x=np.zeros((8, 4, 8))),
    "negative layer": lambda arrays: arrays | {"layer.-1": arrays["layer.1"]},
    "unnamed layer": lambda arrays: arrays | {"1": arrays["layer.1"]},
    "no positions": lambda arrays: {
        name: value if name == "provenance" else value[:0] for name, value in arrays.items()
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a good file."""
    path = tmp_path_factory.mktemp("reference") / "good.npz"
    reference(LLAMA).save(path)
    return path.read_bytes()


def refuse(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(InvalidResult) as caught:
        Reference.load(path)
    assert str(caught.value).startswith(f"no reference can be read from {path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_file_with_other_arrays_is_refused(damage: Any, saved: bytes, tmp_path: Path) -> None:
    with np.load(io.BytesIO(saved)) as arrays:
        changed = damage(dict(arrays))
    file = io.BytesIO()
    np.savez(file, allow_pickle=True, **changed)
    refuse(tmp_path / "reference.npz", file.getvalue())


def test_damaged_file_is_refused(saved: bytes, tmp_path: Path) -> None:
    """Empty, cut off anywhere, text, one array, or with changed bytes; or it is missing, or a folder."""
    path, one = tmp_path / "reference.npz", io.BytesIO()
    np.save(one, np.zeros(3))
    for content in (b"", b"text", b"{}", one.getvalue(), *(saved[:size] for size in range(1, len(saved), 997))):
        refuse(path, content)
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        at = archive.getinfo("layer.1.npy").header_offset + 500
    refuse(path, saved[:at] + bytes([saved[at] ^ 1]) + saved[at + 1 :])
    for missing in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(InvalidResult, match="no reference can be read from"):
            Reference.load(missing)


def test_values_of_two_prompts_are_of_their_own() -> None:
    """Recording does not share memory with another recording, or with the model."""
    model = LLAMA.shared()
    first = record_z(model, PROMPT)
    kept = {layer: z.clone() for layer, z in first.items()}
    record_z(model, PROMPT[::-1])
    assert all(torch.equal(z, kept[layer]) for layer, z in first.items())
    assert Values(first).by_position
