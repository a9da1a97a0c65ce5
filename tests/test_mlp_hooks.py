"""The hooks of MLPs in threads, in decoding and in backward(), and MLPs in results."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ablation.checks.decoders import Decoder
from ablation.edits import Ablation
from ablation.engine import run
from ablation.errors import AblationNotApplied, InvalidAblation, InvalidResult
from ablation.heads import find_heads
from ablation.hook import HeadAblation
from ablation.imputation import Imputation, Site
from ablation.results import AblationKey, Result
from ablation.studies.pairs import Pairs, sets_of_two
from ablation.studies.sets import curve_sets
from ablation.tables import to_frame
from ablation.units import each, parse_set
from tests.comparing import IDS, assert_results_equal
from tests.test_checkpointing import REENTRANT, checkpointed, gradients
from tests.test_hook import hooks_of, logits

GPT2 = Decoder("gpt2", num_layers=3, num_heads=3, head_dim=2)
HYBRID = Decoder("lfm2", num_layers=4, num_heads=2, head_dim=4)
"""Only layers 1 and 3 have heads."""

# ---- the life of the hooks


def number_of(hooks: dict[str, list[Any]]) -> int:
    return sum(map(len, hooks.values()))


def test_hooks_of_mlps_come_on_demand_and_leave() -> None:
    model = GPT2.fresh()
    before, clean = hooks_of(model), logits(model, torch.tensor([IDS]))
    hook = HeadAblation(model)
    for _ in range(2):
        with hook:
            entered = hooks_of(model)
            for imputation in ("zero", "mean"):
                hook.ablate([(1, "mlp"), (1, 0)], imputation)
                assert number_of(hooks_of(model)) == number_of(entered) + 1
                ablated = logits(model, torch.tensor([IDS]))
                assert not torch.equal(ablated, clean)
            hook.clear()
            assert torch.equal(logits(model, torch.tensor([IDS])), clean)
            assert (hook.receipt.calls, hook.receipt.mlp_calls) == ([1, 1, 1], [0, 1, 0])
        assert hooks_of(model) == before


def test_unused_ablation_of_an_mlp_is_reported() -> None:
    with pytest.raises(AblationNotApplied, match="layer 1, MLP was set to be"), HeadAblation(GPT2.shared()) as hook:
        hook.ablate([(1, "mlp")])


def test_other_threads_are_not_ablated() -> None:
    model, found = GPT2.shared(), []
    clean = logits(model, torch.tensor([IDS]))
    with HeadAblation(model) as hook:
        hook.ablate([(1, "mlp")])
        other = threading.Thread(target=lambda: found.append(logits(model, torch.tensor([IDS]))))
        other.start()
        other.join()
        assert torch.equal(found[0], clean) and not torch.equal(logits(model, torch.tensor([IDS])), clean)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_generation_with_a_cache_equals_whole_passes(family: str) -> None:
    model, prompt = Decoder(family, num_layers=2, num_heads=2, head_dim=4).shared(), torch.tensor([[3, 1, 4]])
    how: Any = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with HeadAblation(model) as hook:
        for imputation, positions in (("zero", None), ("scale:-0.5", None), ("zero", [1, 4])):
            hook.ablate([(0, "mlp"), (1, 1)], imputation, positions)
            cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **how)
            expected = prompt
            for _ in range(4):
                positions_so_far = None if positions is None else [p for p in positions if p < expected.shape[1]]
                hook.ablate([(0, "mlp"), (1, 1)], imputation, positions_so_far)
                following = logits(model, expected)[:, -1:].argmax(-1)
                expected = torch.cat([expected, following], dim=1)
            assert cached.tolist() == expected.tolist()


def mlps_and_one_backward(model: PreTrainedModel, ablation: HeadAblation) -> None:
    losses = []
    ids = torch.tensor([IDS, IDS[::-1]])
    for pairs, imputation in (([(1, "mlp")], "zero"), ([(2, "mlp"), (1, 1)], "mean"), ([(0, 0)], "zero")):
        ablation.ablate(pairs, imputation)  # type: ignore[arg-type]
        losses.append(model(ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss)
    sum(losses).backward()


@REENTRANT
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_checkpointed_mlps_are_recomputed_as_recorded(family: str, reentrant: bool) -> None:
    decoder = Decoder(family, num_layers=3, num_heads=4, head_dim=4)
    want = gradients(decoder.fresh(), mlps_and_one_backward)
    model: Any = checkpointed(decoder, reentrant)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):  # of OPT
            module.dropout = 0.0
    got = gradients(model, mlps_and_one_backward)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_backward_in_another_thread_recomputes_mlps() -> None:
    """As on a GPU, where autograd has threads of its own."""

    def elsewhere(model: PreTrainedModel, ablation: HeadAblation) -> None:
        ablation.ablate([(1, "mlp")], "mean")
        ids = torch.tensor([IDS])
        loss = model(ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    decoder = Decoder("gpt2", num_layers=3, num_heads=4, head_dim=4)
    want, got = (gradients(model, elsewhere) for model in (decoder.fresh(), checkpointed(decoder, reentrant=False)))
    assert got.keys() == want.keys() and got
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


class SeesSites(Imputation):
    """Notes the sites that it is applied to."""

    name, reads = "sees sites", "nothing"

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool, list[int]]] = []

    def __call__(self, z: Tensor, site: Site) -> Tensor:
        self.seen.append((site.layer, site.is_mlp, site.heads.tolist()))
        return z.new_zeros(())


def test_own_imputation_knows_an_mlp_from_a_head() -> None:
    mine = SeesSites()
    with HeadAblation(GPT2.shared()) as hook:
        hook.ablate([(1, "mlp"), (1, 0)], mine)
        logits(GPT2.shared(), torch.tensor([IDS]))
    assert mine.seen == [(1, False, [0]), (1, True, [0])]


# ---- results


def test_results_name_mlps(tmp_path: Any) -> None:
    ablations = [Ablation([(1, "mlp")]), Ablation([(2, 0), (0, "mlp")]), Ablation([(1, 0)])]
    result = run(GPT2.shared(), IDS, ablations, 7, 11)
    assert [key.label for key in result.ablations] == ["MLP1", "L2H0+MLP0", "L1H0"]
    result.save(tmp_path)
    loaded = Result.load(tmp_path)
    assert loaded.ablations == result.ablations and loaded.ablations[0] == AblationKey(((1, "mlp"),), "zero")
    assert_results_equal(loaded, result, atol=0)
    frame = to_frame(result).drop_duplicates("heads")
    assert frame["heads"].tolist() == ["MLP1", "L2H0+MLP0", "L1H0"]
    assert frame["layer"].fillna(-1).tolist() == [1, -1, 1] and frame["head"].fillna(-1).tolist() == [-1, -1, 0]


def test_mlp_has_no_place_on_a_map_of_heads() -> None:
    result = run(GPT2.shared(), IDS, [Ablation([(1, "mlp")]), Ablation([(1, 0)])], 7, 11)
    with pytest.raises(InvalidResult, match="an MLP is no head, and has no place on a map of heads"):
        result.grid(result.kept)


def test_notation_gives_the_mlps_of_a_hybrid() -> None:
    """Layers without heads have MLPs, too."""
    heads = find_heads(HYBRID.shared())
    every = parse_set("MLP* L1H0").heads(heads)
    assert every == ((0, "mlp"), (1, 0), (1, "mlp"), (2, "mlp"), (3, "mlp"))
    assert [units.text for units in each("MLP*", heads)] == ["MLP0", "MLP1", "MLP2", "MLP3"]
    result = run(HYBRID.shared(), IDS, [Ablation(every), *(Ablation(u.heads(heads)) for u in each("MLP*", heads))])
    assert result.provenance["method"] == "growing batch" and (result.calls == 1).all()


def test_pairs_of_heads_and_mlps_are_studied() -> None:
    """Within a layer, an MLP sorts after the heads."""
    model = GPT2.shared()
    sets = sets_of_two([(1, "mlp"), (1, 2), (0, 0)])
    assert sets[-1] == ((1, 2), (1, "mlp"))
    found = Pairs.of(run(model, IDS, list(map(Ablation, sets)), 7, 11))
    assert found.heads == ((0, 0), (1, 2), (1, "mlp")) and len(found.pairs) == 3
    with pytest.raises(InvalidResult, match="the result has no ablation of MLP1 alone"):
        Pairs.of(run(model, IDS, [Ablation([(1, 2)]), Ablation([(1, 2), (1, "mlp")])], 7, 11))


def test_removal_curves_of_mlps_are_refused() -> None:
    with pytest.raises(InvalidAblation, match="a removal curve is of heads, as its random orders are: name no MLPs"):
        curve_sets(find_heads(GPT2.shared()), [(1, 2), (1, "mlp")], None, 2, 0)
