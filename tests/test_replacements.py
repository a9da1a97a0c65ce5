"""What replaces z in a study: reference means, and z of other prompts, drawn with a seed; averages over draws."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ablation.checks.decoders import Decoder
from ablation.edits import Ablation
from ablation.engine import run
from ablation.errors import InvalidAblation, InvalidPrompt, InvalidResult, UnknownImputation
from ablation.hook import HeadAblation
from ablation.imputation import Imputation, Scale, Site, Values
from ablation.results import RECEIPTS, AblationKey, Result
from ablation.studies.replacements import Replacements, needs_reference
from ablation.sweeps import one_head_ablations
from tests.comparing import ATOL
from tests.surgery import reference
from tests.synthetic import synthetic
from tests.test_hook import logits

LLAMA = Decoder("llama", num_layers=3, num_heads=4, head_dim=8, num_key_value_groups=2)
PROMPT = (3, 1, 4, 1, 5)
POOL = [(1, 2, number, 4, 5) for number in range(12)] + [(1,), (2, 3), (6, 7, 8, 9, 10, 11), PROMPT]
OTHERS = {prompt for prompt in POOL if len(prompt) == 5 and prompt != PROMPT}


def drawn(draws: int = 3, seed: int = 0, pool: Any = POOL, prompt: Any = PROMPT) -> tuple[Any, ...]:
    return Replacements.of(["zero", "resample"], pool=pool, draws=draws, seed=seed).sources(prompt)


# ---- draws


@given(st.permutations(POOL), st.integers(1, 20), st.integers(0, 2**70))
def test_draws_are_other_prompts_of_equal_length(pool: list[Any], draws: int, seed: int) -> None:
    """Each once; the same in any order of the pool, also if a prompt occurs twice; all, if there are too few."""
    found = drawn(draws, seed, pool + pool[:3])
    assert len(found) == len(set(found)) == min(draws, len(OTHERS)) and set(found) <= OTHERS
    assert found == drawn(draws, seed)


def test_draws_depend_on_the_seed_and_the_prompt() -> None:
    """A seed that is larger by one is another draw, not a draw that is shifted by one."""
    of_seeds = [drawn(3, seed) for seed in range(20)]
    of_prompts = [drawn(3, 0, prompt=(number,) * 5) for number in range(20)]
    for draws in (of_seeds, of_prompts):
        assert len(set(draws)) > 15 and len(set(map(frozenset, draws))) > 15
        assert all(first[1:] != second[:-1] for first, second in itertools.pairwise(draws))


def test_every_prompt_is_drawn_equally_often() -> None:
    """Within five standard deviations of 300 draws of 12."""
    counts = Counter(source for seed in range(300) for source in drawn(1, seed))
    assert counts.keys() == OTHERS
    assert all(abs(count - 25) < 5 * (300 / 12 * 11 / 12) ** 0.5 for count in counts.values())


def test_fewer_draws_are_the_first_of_more() -> None:
    assert drawn(7)[:3] == drawn(3)


@pytest.mark.parametrize("make", [np.array, torch.tensor, tuple])
def test_pool_and_prompt_may_be_arrays(make: Any) -> None:
    pool = [prompt for prompt in POOL if len(prompt) == 5]
    found = drawn(3, 0, make(pool), make(PROMPT))
    assert found == drawn(3, 0, pool) and all(type(token) is int for prompt in found for token in prompt)


def test_prompt_without_others_of_its_length_is_refused() -> None:
    for prompt, pool in (((1, 2, 3), POOL), (PROMPT, [PROMPT, PROMPT]), (PROMPT, [])):
        with pytest.raises(InvalidPrompt, match=f"no other prompt has {len(prompt)} tokens, so there is none"):
            drawn(3, 0, pool, prompt)


def test_given_source_is_taken_instead_of_a_draw() -> None:
    """Also the prompt itself; one of another length is refused. Nothing is taken without `resample`."""
    replacements = Replacements.of(["resample"], pool=POOL, draws=3)
    for given_one in ((9, 8, 7, 6, 5), PROMPT):
        assert replacements.sources(PROMPT, list(given_one)) == (given_one,)
    for length in (4, 6):
        reason = f"the prompt to resample from has {length} tokens, the prompt 5"
        with pytest.raises(InvalidPrompt, match=reason):
            replacements.sources(PROMPT, [1] * length)
    assert Replacements.of(["zero"]).sources(PROMPT, [1, 2]) == ()


# ---- lists of imputations


class Named(Imputation):
    name = "resample"
    reads = "nothing"

    def __call__(self, z: Any, site: Site) -> Any:
        return z.new_zeros(())


@pytest.mark.parametrize("name", ["reference-mean", "reference-mean-by-position"])
def test_reference_means_need_a_reference(name: str) -> None:
    assert needs_reference(["zero", name]) and not needs_reference(["zero", "resample", Scale(0.5)])
    with pytest.raises(UnknownImputation, match=f"'{name}' needs reference prompts"):
        Replacements.of(["zero", name])
    replacements = Replacements.of(["zero", name], reference(LLAMA))
    assert replacements.names == ["zero", name]
    (_, found) = replacements.of_prompt(LLAMA.shared(), ())
    assert isinstance(found, Values) and found.by_position == name.endswith("position")


@pytest.mark.parametrize(
    ("imputations", "error"),
    [
        ("zero", UnknownImputation),
        (Scale(0.5), UnknownImputation),
        (None, UnknownImputation),
        (["median"], UnknownImputation),
        ([None], UnknownImputation),
        ([], InvalidAblation),
        (["zero", "zero"], InvalidAblation),
        (["resample", "resample"], InvalidAblation),
        (["resample", Named()], InvalidAblation),
        (["scale:0.5", Scale(0.5)], InvalidAblation),
        (["scale:1", "scale:1.0"], InvalidAblation),
    ],
)
def test_lists_of_no_imputations_are_refused(imputations: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Replacements.of(imputations, reference(LLAMA), POOL)


@pytest.mark.parametrize("draws", [0, -1, 1.0, True, None, "3"])
def test_draws_that_are_no_number_are_refused(draws: Any) -> None:
    with pytest.raises(InvalidAblation, match="^draws is .*: it is a number of prompts, at least 1$"):
        Replacements.of(["resample"], draws=draws)


@pytest.mark.parametrize("seed", [-1, 0.5, True, None, "3"])
def test_seed_that_is_no_number_is_refused(seed: Any) -> None:
    with pytest.raises(InvalidAblation, match="^the seed is .*: it is a whole number, at least 0$"):
        Replacements.of(["resample"], seed=seed)


def test_users_imputation_may_be_called_resample() -> None:
    """It needs no other prompts."""
    own = Named()
    replacements = Replacements.of([own])
    assert replacements.sources(PROMPT) == () and replacements.of_prompt(LLAMA.shared(), ()) == [own]


# ---- resampled z


def test_resampled_z_is_that_of_the_other_prompt() -> None:
    """Each draw in a column of its own; those of one key are averaged."""
    model = LLAMA.shared()
    replacements = Replacements.of(["zero", "resample", "scale:0.5"], pool=POOL, draws=3)
    sources = replacements.sources(PROMPT)
    imputations = replacements.of_prompt(model, sources)
    assert [of.name for of in imputations] == ["zero", "resample", "resample", "resample", "scale:0.5"]
    result = run(model, PROMPT, one_head_ablations(model, imputations), 7, 11)
    for source, index in zip(sources, range(4, 16, 4), strict=True):  # of layer 0, head 0
        z: list[Any] = []
        projection = model.model.layers[0].self_attn.o_proj
        handle = projection.register_forward_pre_hook(lambda _, args, into=z: into.append(args[0][..., :8].clone()))
        logits(model, torch.tensor([source]))
        handle.remove()

        def edit(_: Any, args: Any, value: Any = z[0]) -> Any:
            return (torch.cat([value, args[0][..., 8:]], dim=-1),)

        handle = projection.register_forward_pre_hook(edit)
        want = logits(model, torch.tensor([PROMPT]))[0, -1].double().log_softmax(-1)
        handle.remove()
        got = result.ablated["target_log_probability"][0, index]
        assert got == pytest.approx(float(want[7]), abs=2 * ATOL["float32"])
    averaged = result.averaged_over_draws()
    assert averaged.imputations == ("zero", "resample", "scale:0.5") and len(averaged.ablations) == 36
    assert averaged.grid(averaged.change("kl")).shape == (1, 3, 3, 4)


def test_prompt_resampled_from_itself_is_the_identity() -> None:
    model = LLAMA.shared()
    (own,) = Replacements.of(["resample"]).of_prompt(model, [PROMPT])
    with HeadAblation(model) as hook:
        clean = logits(model, torch.tensor([PROMPT]))
        hook.ablate(LLAMA.heads(), own, [0, 2, -1])
        assert torch.equal(logits(model, torch.tensor([PROMPT])), clean)
    result = run(model, PROMPT, [Ablation([pair], own) for pair in LLAMA.heads()])
    # The growing batch has other shapes than the recorded run, so z may differ in its last bits.
    np.testing.assert_allclose(result.ablated["kl"], 0.0, atol=1e-9)


# ---- averages over draws


def with_draws(draws: int, seed: int) -> Result:
    """An invented result of three prompts: columns of keys in a mixed order, some of which occur `draws` times."""
    random = np.random.RandomState(seed)
    single = [AblationKey(((0, head),), "zero") for head in range(2)]
    several = [AblationKey(((0, head),), "resample", at) for head in range(2) for at in ("all", "0,-1")]
    keys = [single[0], *several, single[1], *several * (draws - 1)]
    shape = (3, len(keys))
    base = synthetic(1, 2, prompts=3)
    ablated: dict[str, Any] = {name: random.randn(*shape) for name in base.ablated}
    ablated["argmax"] = random.randint(0, 3, shape)
    ablated["target_rank"] = random.randint(1, 9, shape)
    ablated["correct"] = (ablated["argmax"] == 0).astype(float)
    receipts: dict[str, Any] = {name: random.randint(0, 50, shape) for name in RECEIPTS}
    return replace(base, ablations=tuple(keys), ablated=ablated, **receipts)


@given(st.integers(1, 5), st.integers(0, 1000))
def test_averages_over_draws_are_those_of_a_plain_loop(draws: int, seed: int) -> None:
    result = with_draws(draws, seed)
    averaged = result.averaged_over_draws()
    assert averaged.ablations == tuple(dict.fromkeys(result.ablations))
    for column, key in enumerate(averaged.ablations):
        own = [number for number, other in enumerate(result.ablations) if other == key]
        assert len(own) == (draws if key.imputation == "resample" else 1)
        for prompt in range(3):
            for name, found in averaged.ablated.items():
                values = [result.ablated[name][prompt, number].item() for number in own]
                if name == "argmax":
                    counts = Counter(values)
                    want = min(value for value in values if counts[value] == max(counts.values()))
                elif name == "target_rank":
                    want = sorted(values)[(len(values) - 1) // 2]
                else:
                    want = sum(values) / len(values)
                assert found.dtype == result.ablated[name].dtype
                assert found[prompt, column] == pytest.approx(want, rel=0, abs=1e-14), name
            for name in RECEIPTS:
                values = [getattr(result, name)[prompt, number] for number in own]
                assert getattr(averaged, name)[prompt, column] == min(values)
    averaged._check_shapes()
    assert averaged.clean is result.clean and averaged.head_mean is result.head_mean


def test_average_of_single_draws_changes_nothing() -> None:
    result = with_draws(1, 0)
    assert result.averaged_over_draws() is result
    twice = with_draws(3, 0).averaged_over_draws()
    assert twice.averaged_over_draws() is twice


def test_map_shows_one_ablation_of_a_head() -> None:
    """Others would be lost without a word: draws are averaged before, positions are maps of their own."""
    at_positions = with_draws(1, 0)
    for result in (at_positions, with_draws(2, 0)):
        with pytest.raises(InvalidResult, match="a head has several ablations of one imputation, but one place"):
            result.grid(result.ablated["kl"])
