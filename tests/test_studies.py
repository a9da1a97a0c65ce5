"""Studies with every imputation, a reference and positions: the numbers are those of one hooked forward each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablation.edits import Ablation
from ablation.engine import run_sequential
from ablation.errors import InvalidOutput
from ablation.imputation import Imputation, Values
from ablation.models import LoadedModel
from ablation.prompts import Question, prompt_ids
from ablation.reference import Reference, record_z
from ablation.results import Result
from ablation.studies.experiment import Study, sweep_prompts
from ablation.studies.moved import of_strongest
from ablation.studies.replacements import Replacements
from tests.comparing import ATOL, arrays, assert_results_equal
from tests.test_checkpoint import Interrupted, assert_same_bits

CITIES = ["Berlin", "Paris", "Madrid", "Rome"]
RECORDS: list[dict[str, Any]] = [
    {"prompt": f"{city} is the capital of", "target": " Germany", "control": " France", "subject": city}
    for city in CITIES
]
OTHERS = [{"prompt": f"{city} is the capital of"} for city in ("Vienna", "Oslo", "Quito")]
NAMES = ["zero", "mean", "channel-mean", "reference-mean", "reference-mean-by-position", "resample", "scale:0.5"]


def ids_of(loaded: LoadedModel, records: Iterable[Mapping[str, Any]]) -> list[tuple[int, ...]]:
    return [tuple(prompt_ids(loaded.tokenizer, record["prompt"])) for record in records]


def few_heads(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a study ablate only the heads of layers 0 and 11, to save time."""
    every = study._ablations

    def few(index: int, prepared: Any) -> list[Ablation]:
        return [of for of in every(index, prepared) if of.heads[0][0] in (0, 11) and of.heads[0][1] < 2]

    monkeypatch.setattr(study, "_ablations", few)


def expected(
    loaded: LoadedModel, record: Mapping[str, Any], sources: Sequence[tuple[int, ...]], reference: Reference, at: Any
) -> Result:
    """The result of one prompt by one hooked forward for each ablation, with imputations that are built by hand."""
    imputations: list[str | Imputation] = []
    for name in NAMES:
        if name == "resample":
            imputations += [Values(record_z(loaded.model, ids), "resample") for ids in sources]
        else:
            imputations.append(reference.imputation(name) if name.startswith("reference") else name)
    ablations = [
        Ablation([(layer, head)], imputation, at) for layer in (0, 11) for imputation in imputations for head in (0, 1)
    ]
    (ids,) = ids_of(loaded, [record])
    target, control = (loaded.tokenizer.encode(record[name]) for name in ("target", "control"))
    return run_sequential(loaded.model, ids, ablations, target, control)


@pytest.mark.parametrize(
    ("positions", "at", "draws"),
    [
        ("subject", [0], 2),
        *(
            pytest.param(*how, marks=pytest.mark.end_to_end)
            for how in (("all", None, 2), ("last", [4], 1), ([0, -2], [0, 3], 2))
        ),
    ],
)
def test_study_is_one_hooked_forward_per_ablation(
    capitals: LoadedModel, monkeypatch: pytest.MonkeyPatch, positions: Any, at: Any, draws: int
) -> None:
    study = Study(capitals, RECORDS, NAMES, reference=OTHERS, positions=positions, draws=draws, seed=3)
    few_heads(study, monkeypatch)
    result = study.run()
    pool = ids_of(capitals, OTHERS)
    reference, drawing = Reference.of(capitals.model, pool), Replacements.of(["resample"], None, pool, draws, 3)
    for index, record in enumerate(RECORDS):
        (ids,) = ids_of(capitals, [record])
        one = expected(capitals, record, drawing.sources(ids), reference, at).averaged_over_draws()
        found = result.of_prompt(index)
        label = positions if isinstance(positions, str) else "0,-2"
        assert {key.positions for key in found.ablations} == {label}
        keys = [key._replace(positions="") for key in found.ablations]
        assert keys == [key._replace(positions="") for key in one.ablations]
        for name in ("kl", "target_log_probability", "control_log_probability"):
            assert np.abs(found.ablated[name] - one.ablated[name]).max() < ATOL["float32"], name
        assert np.array_equal(found.replaced, one.replaced) and found.replaced.min() > 0
        assert found.provenance.get("positions") == at
        drawn = [capitals.decode(*source) for source in drawing.sources(ids)]
        assert found.provenance["resampled_from"] == drawn and len(drawn) == draws


def test_reference_is_by_default_the_data_set(capitals: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(capitals, RECORDS, ["reference-mean", "resample"])
    few_heads(study, monkeypatch)
    result = study.run()
    own = Reference.of(capitals.model, ids_of(capitals, RECORDS))
    assert study.plan.computed is not None and study.plan.computed.sha256 == own.sha256
    assert result.provenance["reference"]["sha256"] == own.sha256 and result.provenance["reference"]["prompts"] == 4
    for index, record in enumerate(RECORDS):
        (drawn,) = result.of_prompt(index).provenance["resampled_from"]
        assert drawn != record["prompt"] and drawn in {of["prompt"] for of in RECORDS}


def test_given_reference_is_used_as_it_is(capitals: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference.of(capitals.model, ids_of(capitals, OTHERS))
    results = []
    for given in (reference, OTHERS, [Question(of["prompt"]) for of in OTHERS]):
        study = Study(capitals, RECORDS[:1], ["reference-mean"], reference=given)
        few_heads(study, monkeypatch)
        results.append(study.run())
        assert (study.plan.computed is None) == (given is reference)
    for other in results[1:]:
        assert_results_equal(results[0], other, 0)


def test_order_of_prompts_changes_no_number(capitals: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def numbers(records: list[dict[str, Any]]) -> dict[str, list[bytes]]:
        study = Study(capitals, records, NAMES, draws=2)
        few_heads(study, monkeypatch)
        result = study.run()
        return {
            prompt.prompt or "": [
                of.tobytes() for of in arrays(result.of_prompt(index)).values() if isinstance(of, np.ndarray)
            ]
            for index, prompt in enumerate(result.prompts)
        }

    assert numbers(RECORDS) == numbers(RECORDS[::-1])


def test_seed_changes_only_the_draws(capitals: LoadedModel) -> None:
    def drawn(seed: int) -> list[Any]:
        return Study(capitals, RECORDS, ["resample"], reference=OTHERS, seed=seed).sources

    assert drawn(0) == drawn(0) and any(drawn(0) != drawn(seed) for seed in range(1, 5))


def test_column_resample_names_the_source(capitals: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    record = RECORDS[0] | {"resample": "Rome is the capital of"}
    study = Study(capitals, [record], ["resample"])
    few_heads(study, monkeypatch)
    result = study.run()
    assert result.provenance["resampled_from"] == ["Rome is the capital of"]
    by_hand = Values(record_z(capitals.model, ids_of(capitals, [{"prompt": "Rome is the capital of"}])[0]), "resample")
    other = Study(capitals, [record], [by_hand])
    few_heads(other, monkeypatch)
    assert_results_equal(result, other.run(), 0)


def test_resampling_from_the_prompt_itself_changes_nothing(
    capitals: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(capitals, [RECORDS[0] | {"resample": RECORDS[0]["prompt"]}], ["resample"])
    few_heads(study, monkeypatch)
    assert np.abs(study.run().change("logit_difference")).max() < ATOL["float32"]


def test_target_of_several_tokens_is_swept_with_every_imputation(
    capitals: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(capitals, [RECORDS[0] | {"target": " Germany France"}], NAMES, reference=OTHERS, positions="last")
    few_heads(study, monkeypatch)
    result = study.run()
    assert len(result.prompts[0].target) == 2 and np.isfinite(result.ablated["target_log_probability"]).all()


def test_interrupted_study_goes_on_with_the_same_bits(capitals: LoadedModel, tmp_path: Path) -> None:
    call: dict[str, Any] = {"reference": OTHERS, "positions": "subject", "draws": 2}
    names = ["reference-mean", "resample"]
    whole = sweep_prompts(capitals, RECORDS[:2], names, **call)
    shares: list[float] = []

    def stop(share: float) -> None:
        shares.append(share)
        if share > 0.75:
            raise Interrupted

    with pytest.raises(Interrupted):
        sweep_prompts(capitals, RECORDS[:2], names, **call, checkpoint=tmp_path, progress=stop)
    assert 0 < shares[0] < 0.01 and shares == sorted(shares)
    for change in ({"draws": 1}, {"seed": 4}, {"positions": "last"}, {"reference": OTHERS[:2]}, {"reference": None}):
        with pytest.raises(InvalidOutput, match="holds an unfinished run with other settings"):
            sweep_prompts(capitals, RECORDS[:2], names, **call | change, checkpoint=tmp_path)
    shares.clear()
    again = sweep_prompts(capitals, RECORDS[:2], names, **call, checkpoint=tmp_path, progress=shares.append)
    assert_same_bits(again, whole)
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_other_values_of_one_name_are_other_settings(capitals: LoadedModel, tmp_path: Path) -> None:
    z = record_z(capitals.model, ids_of(capitals, RECORDS)[1])

    def stop(_: float) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        sweep_prompts(capitals, RECORDS[:1], [Values(z)], checkpoint=tmp_path, progress=stop)
    other = Values({layer: 2 * value for layer, value in z.items()})
    with pytest.raises(InvalidOutput, match="other settings .values_sha256"):
        sweep_prompts(capitals, RECORDS[:1], [other], checkpoint=tmp_path)


@pytest.mark.end_to_end
def test_strongest_ablations_work_with_every_imputation(capitals: LoadedModel) -> None:
    study = Study(capitals, RECORDS[:2], NAMES, reference=OTHERS, positions="subject")
    result = study.run()
    found = of_strongest(capitals, result, 300, ablations=study.ablations)
    assert {of.ablation.imputation for of in found} == set(NAMES)
    for of in found:
        changes = {t.token: t.change for t in (*of.rising, *of.falling)}
        (target,) = result.prompts[of.prompt].target
        effect = result.change("target_probability")[of.prompt, result.ablations.index(of.ablation)]
        assert changes.get(target, effect) == pytest.approx(effect, abs=ATOL["float32"])
    assert any(result.prompts[of.prompt].target[0] in {t.token for t in of.falling} for of in found)
