"""Sets of heads with every imputation, positions, metrics and checkpoints; sets that are none."""

# ruff: noqa: F811 (fixtures)

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablation.errors import InvalidAblation, InvalidOutput
from ablation.imputation import Values
from ablation.models import LoadedModel
from ablation.prompts import prompt_ids
from ablation.reference import Reference, record_z
from ablation.results import Result
from ablation.studies.curves import Curve
from ablation.studies.experiment import sweep_prompts
from ablation.studies.pairs import Pairs, sets_of_two
from ablation.studies.replacements import Replacements
from ablation.studies.sets import removal_curve, sweep_pairs
from ablation.sweeps import HeadSet
from tests.comparing import ATOL, assert_results_equal
from tests.test_checkpoint import Interrupted, assert_same_bits
from tests.test_set_studies import HEADS, RECORDS, hooked, tiny  # noqa: F401


def test_sets_take_draws_references_and_positions(tiny: LoadedModel) -> None:
    names = ["resample", "reference-mean", "zero"]
    sets = {"both": [(0, 0), (2, 1)], "layer": [(1, 0), (1, 1)]}
    result = sweep_prompts(tiny, RECORDS, names, sets=sets, positions=[0, -1], draws=2, seed=3)
    assert [key.title for key in result.ablations] == ["both", "layer"] * 3
    assert {key.positions for key in result.ablations} == {"0,-1"}
    pool = [tuple(prompt_ids(tiny.tokenizer, record["prompt"])) for record in RECORDS]
    drawing, reference = Replacements.of(["resample"], None, pool, 2, 3), Reference.of(tiny.model, pool)
    for p in range(3):
        last = len(pool[p]) - 1
        sources = [Values(record_z(tiny.model, ids), "resample") for ids in drawing.sources(pool[p])]
        assert len(sources) == 2
        for number, heads in enumerate(sets.values()):
            runs = [hooked(tiny, p, frozenset(heads), source, (0, last)) for source in sources]
            mean = hooked(tiny, p, frozenset(heads), reference.mean(), (0, last))
            zero = hooked(tiny, p, frozenset(heads), "zero", (0, last))
            for metric in ("kl", "target_log_probability", "target_probability"):
                found = result.ablated[metric][p]
                drawn = (runs[0][metric] + runs[1][metric]) / 2
                assert found[number] == pytest.approx(drawn, abs=ATOL["float64"])
                assert found[2 + number] == pytest.approx(mean[metric], abs=ATOL["float64"])
                assert found[4 + number] == pytest.approx(zero[metric], abs=ATOL["float64"])


def test_curve_takes_the_options_of_a_sweep(tiny: LoadedModel) -> None:
    options: dict[str, Any] = {"positions": "subject", "draws": 2, "skip_bad": True}
    bad = {"prompt": "", "target": " Germany"}
    with pytest.warns(UserWarning, match="prompt 4, column prompt: it is empty") as caught:
        result = removal_curve(tiny, [*RECORDS, bad], [(1, 1), (0, 0)], None, ["resample"], random=1, **options)
    assert caught[0].filename == __file__
    assert len(result.prompts) == 3 and {key.positions for key in result.ablations} == {"subject"}
    assert (result.provenance["draws"], result.provenance["seed"]) == (2, 0)
    assert Curve.of(result).ks == (1, 2)


def test_metrics_of_the_users_own_are_in_the_result(tiny: LoadedModel) -> None:
    metrics = {"largest": lambda logits: logits.max(dim=-1).values}
    curve = removal_curve(tiny, RECORDS, HEADS[:2], random=1, metrics=metrics)
    pairs = sweep_pairs(tiny, RECORDS, heads=HEADS[:2], metrics=metrics)
    for result in (curve, pairs):
        assert result.ablated["largest"].shape == (3, len(result.ablations))
    assert Pairs.of(pairs).interaction("largest").shape == (3, 1)


@pytest.mark.parametrize("study", ["curve", "pairs"])
def test_interrupted_study_of_sets_goes_on_with_the_same_bits(tiny: LoadedModel, tmp_path: Path, study: str) -> None:
    def run(**options: Any) -> Result:
        if study == "pairs":
            return sweep_pairs(tiny, RECORDS, **options)
        order = options.pop("order", HEADS[1:4])
        return removal_curve(tiny, RECORDS, order, random=2, **options)

    def stop(share: float) -> None:
        if share > 0.7:
            raise Interrupted

    whole = run()
    with pytest.raises(Interrupted):
        run(checkpoint=tmp_path / "out", progress=stop)
    other: dict[str, Any] = {"heads": HEADS[:3]} if study == "pairs" else {"seed": 1}
    with pytest.raises(InvalidOutput, match="sets"):
        run(checkpoint=tmp_path / "out", **other)
    kept = sorted(path.name for path in (tmp_path / "out" / "unfinished").iterdir())
    assert kept == ["000000", "000001", "settings.json"]
    assert_same_bits(run(checkpoint=tmp_path / "out"), whole)
    with pytest.raises(Interrupted):
        run(checkpoint=tmp_path / "out", progress=stop)
    assert len(run(checkpoint=tmp_path / "out", overwrite=True, **other).prompts) == 3


@pytest.mark.parametrize(
    "sets",
    [
        [[(0, 0)], [(0, 0)]],
        [[(0, 0), (1, 1)], [(1, 1), (0, 0)]],
        [],
        {},
        [HeadSet("one", ((0, 0),)), HeadSet("one", ((0, 0),))],
    ],
)
def test_equal_or_no_sets_are_refused(tiny: LoadedModel, sets: Any) -> None:
    with pytest.raises(InvalidAblation, match="at least one set of heads, and each only once"):
        sweep_prompts(tiny, RECORDS[:1], ["zero"], sets=sets)


def test_sets_may_be_texts(tiny: LoadedModel) -> None:
    texts = sweep_prompts(tiny, RECORDS[:1], ["zero"], sets={"layer": "L1", "two": "L0H0 L1H1"})
    pairs = sweep_prompts(
        tiny, RECORDS[:1], ["zero"], sets={"layer": [h for h in HEADS if h[0] == 1], "two": [(0, 0), (1, 1)]}
    )
    assert texts.ablations == pairs.ablations
    with pytest.raises(InvalidAblation, match=r"`sets` is a list of sets, .*: pass \['L1'\]"):
        sweep_prompts(tiny, RECORDS[:1], ["zero"], sets="L1")


def test_two_sets_of_one_name_are_refused(tiny: LoadedModel) -> None:
    sets = [HeadSet("", ((1, 1),)), HeadSet("", ((0, 1),)), HeadSet("one", ((0, 0),)), HeadSet("one", ((1, 0),))]
    with pytest.raises(InvalidAblation, match="two sets of heads have the name 'one': rename one"):
        sweep_prompts(tiny, RECORDS[:1], ["zero"], sets=sets)


def test_set_without_heads_is_the_clean_run(tiny: LoadedModel) -> None:
    result = sweep_prompts(tiny, RECORDS, ["zero", "mean"], sets={"nothing": [], "head": [(0, 0)]})
    for number in (0, 2):
        assert result.ablations[number].title == "nothing"
        assert np.abs(result.change("target_log_probability")[:, number]).max() <= ATOL["float64"]
        assert result.kept[:, number].all() and not result.replaced[:, number].any()
    assert str(sweep_prompts(tiny, RECORDS[:1], ["zero"], sets=[[]]).ablations[0]) == "no head, zero"


def test_same_heads_with_two_names_are_two_sets(tiny: LoadedModel) -> None:
    result = sweep_prompts(tiny, RECORDS, ["zero"], sets={"one": [(0, 0), (1, 1)], "other": [(1, 1), (0, 0)]})
    assert [key.title for key in result.ablations] == ["one", "other"]
    assert np.abs(result.ablated["kl"][:, 0] - result.ablated["kl"][:, 1]).max() <= ATOL["float64"]


def test_sets_of_single_heads_are_a_sweep(tiny: LoadedModel) -> None:
    sets = sweep_prompts(tiny, RECORDS, ["zero"], sets=[[head] for head in HEADS])
    assert_results_equal(sets, sweep_prompts(tiny, RECORDS, ["zero"]), ATOL["float64"])


def test_result_of_sets_survives_a_round_trip(tiny: LoadedModel, tmp_path: Path) -> None:
    result = removal_curve(tiny, RECORDS, HEADS[:3], random=1)
    result.save(tmp_path / "out")
    assert_same_bits(Result.load(tmp_path / "out"), result)
    assert len(sets_of_two(HEADS)) == 21
