"""Adapters that the helpers make: what they pass on, what they refuse, and that they hide no mistake."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ablation.checks import CHECKS, Case, Decoder, adapter_from_context, adapter_from_function, parametrize_with_checks
from ablation.checks import reproduce as reproduce  # named in the messages that a test runs
from ablation.checks.check import CheckFailure
from ablation.checks.signature import adapter_problem
from ablation.errors import AblationError, InvalidDeclaration
from tests import made_adapters
from tests.made_adapters import MADE, made_and_written, of_pairs, run_ablated
from tests.mutants import MUTANTS, Mutant
from tests.mutants.trial import few_examples, try_check

BY_ID = {check.id: check for check in CHECKS}
CASE = Case(Decoder("gpt2", 2, 3, 8), rows=((3, 1, 4, 1),), heads=((1, 0),))
T = torch.tensor([[3, 1, 4]])


# ---- what is passed on


@pytest.mark.parametrize("factory", MADE, ids=lambda factory: factory.__name__)
def test_made_adapter_of_correct_code_passes(factory: Any) -> None:
    assert adapter_problem(factory) is None
    with few_examples(examples=1):
        for check in ("smoke", "identity", "locality", "oracle.zero", "refusal.head"):
            trial = try_check(BY_ID[check], factory)
            assert trial is not None and not trial.rejected, trial


@pytest.mark.mutants
@pytest.mark.parametrize("factory", MADE, ids=lambda factory: factory.__name__)
def test_made_adapter_of_correct_code_passes_all_checks(factory: Any) -> None:
    with few_examples(examples=4):
        for check in CHECKS:
            trial = try_check(check, factory)
            assert trial is None or not trial.rejected, trial.reason


def recording(calls: list[dict[str, Any]], parameters: str) -> Any:
    """Return a context manager with these parameters, which notes its arguments."""
    names: dict[str, Any] = {}
    exec(f"def my_hook({parameters}):\n    return noted(locals())", {"noted": lambda given: noted(given)}, names)  # noqa: S102

    def noted(given: dict[str, Any]) -> Any:
        calls.append(given)
        return contextlib.nullcontext()

    return names["my_hook"]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("model, heads", {"heads": [(0, 1), (1, 0), (1, 2)]}),
        ("heads, model, /", {"heads": [(0, 1), (1, 0), (1, 2)]}),
        ("*, model, heads, imputation", {"heads": [(0, 1), (1, 0), (1, 2)], "imputation": "mean"}),
        ("model, heads_by_layer", {"heads_by_layer": {0: [1], 1: [0, 2]}}),
        ("model, heads, imputation='zero', seed=3", {"imputation": "mean", "seed": 3}),
        ("model, heads, values, positions, *rest, **more", {"values": {}, "positions": None, "more": {}}),
        ("model, heads, attention_mask, use_cache", {"attention_mask": None, "use_cache": False}),
    ],
)
def test_arguments_are_passed_by_name(parameters: str, expected: dict[str, Any]) -> None:
    calls: list[dict[str, Any]] = []
    model = CASE.model()
    implementation = adapter_from_context(recording(calls, parameters))(model)
    implementation.ablate([(0, 1), (1, 0), (1, 2)], "mean")
    implementation.run(T)
    assert calls[0]["model"] is model and calls[0].items() >= expected.items()
    implementation.clear()
    implementation.run(T)
    assert all(not calls[1][name] for name in expected if name.startswith("heads"))


def test_same_objects_are_passed_in_each_run() -> None:
    """So a hook that changes its arguments gives other logits in the second run."""
    calls: list[dict[str, Any]] = []
    implementation = adapter_from_context(recording(calls, "model, heads"))(CASE.model())
    implementation.ablate(mine := [(0, 1)], "zero")
    implementation.run(T)
    implementation.run(T)
    assert calls[0]["heads"] is calls[1]["heads"] is not mine


def test_one_head_is_passed_alone_and_none_is_not_passed() -> None:
    calls: list[dict[str, Any]] = []
    implementation = adapter_from_context(recording(calls, "model, layer, head"))(CASE.model())
    implementation.run(T)
    assert not calls
    implementation.ablate([(1, 2), (1, 2)], "zero")
    implementation.run(T)
    assert (calls[0]["layer"], calls[0]["head"]) == (1, 2)
    with pytest.raises(AblationError, match="my_hook takes one head, not 2"):
        implementation.ablate([(0, 1), (1, 2)], "zero")


@pytest.mark.parametrize("name", ["cache", "past_key_values", "**inputs"])
@pytest.mark.parametrize("given", ["cache", "past_key_values"])
def test_cache_is_passed_by_the_name_that_the_code_has(name: str, given: str) -> None:
    got: dict[str, Any] = {}
    logits = torch.zeros(1, 3, 5)
    names: dict[str, Any] = {}
    exec(f"def f(model, input_ids, heads, {name}):\n    got.update(locals())\n    return logits", locals(), names)  # noqa: S102
    adapter = adapter_from_function(names["f"])
    empty: Any = []  # false, as a cache without tokens is
    assert adapter(CASE.model()).run(T, use_cache=True, **{given: empty}) is logits
    assert "cache" not in adapter.unsupported
    passed = got["inputs"][given] if name == "**inputs" else got[name]
    assert passed is empty


# ---- what follows from the signature


@pytest.mark.parametrize(
    ("make", "parameters", "unsupported"),
    [
        (adapter_from_context, "model, heads", set()),
        (adapter_from_context, "model, layer, head", {"multiple_heads"}),
        (adapter_from_function, "model, heads, **inputs", set()),
        (adapter_from_function, "model, input_ids, attention_mask, heads", {"position_ids", "cache"}),
        (adapter_from_function, "model, input_ids, heads", {"padding", "position_ids", "cache"}),
        (adapter_from_function, "model, input_ids, attention_mask, position_ids, heads", {"cache"}),
        (adapter_from_function, "model, input_ids, position_ids, heads, cache", {"padding"}),
        (adapter_from_function, "model, layer, head, **inputs", {"multiple_heads", "gradients"}),
    ],
)
def test_unsupported_features_follow_from_the_signature(make: Any, parameters: str, unsupported: set[str]) -> None:
    adapter = make(recording([], parameters), unsupported={"qwen3": "not tried"})
    assert adapter.unsupported.keys() == unsupported | {"checkpointing", "qwen3"}
    assert all(adapter.unsupported.values()) and adapter_problem(adapter) is None


def test_what_follows_from_the_signature_is_the_reason_of_a_skip() -> None:
    reason = BY_ID["independence.cache"].skip_reason(made_adapters.adapter_from_function(run_ablated))
    assert reason == "does not support 'cache': it has no parameter for a key/value cache"


@pytest.mark.parametrize(
    ("parameters", "given", "offered"),
    [
        ("model, heads", None, ("zero",)),
        ("model, heads, imputation", None, ("zero", "mean")),
        ("model, heads", ("mean",), ("mean",)),
        ("model, heads, imputation, values", ["scale", "values", "mine"], ("scale", "values", "mine")),
    ],
)
def test_imputations_follow_from_the_signature(parameters: str, given: Any, offered: tuple[str, ...]) -> None:
    assert tuple(adapter_from_context(recording([], parameters), imputations=given).imputations) == offered


def plain_generator(model: Any, heads: Any) -> Iterator[None]:
    yield


async def coroutine(model: Any, heads: Any) -> None:
    pass


@contextlib.asynccontextmanager
async def asynchronous(model: Any, heads: Any) -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize(
    ("code", "options", "problem"),
    [
        ("model, heads, layers", {}, r"my_hook\(model, heads, layers\): the checks know no 'layers', but model, heads"),
        ("heads", {}, "it has no parameter 'model'"),
        ("model", {}, "it should receive heads as 'heads', or as 'heads_by_layer', or as 'layer' and 'head'"),
        ("model, layer", {}, "it should receive heads as 'heads'"),
        ("model, layer, heads", {}, "it should receive heads as 'heads'"),
        ("*args, **kwargs", {}, "it has no parameter 'model'"),
        ("model, heads", {"imputations": ("zero", "mean")}, "no parameter 'imputation', so it offers one imputation"),
        ("model, heads", {"imputations": ("scale",)}, "by which it would receive the factor of 'scale'"),
        ("model, heads, imputation", {"imputations": ("values",)}, "no parameter 'values'"),
        ("model, heads, imputation", {"imputations": ("resample",)}, "write the adapter as a class"),
        ("model, heads, imputation", {"imputations": ("Zero",)}, "did you mean 'zero'"),
        ("model, heads, imputation", {"imputations": "zero"}, "`imputations` is 'zero', but should be a tuple"),
        ("model, heads", {"imputations": ()}, "it offers no imputation"),
        ("model, heads", {"unsupported": {"zero": "never"}}, "it offers no imputation"),
        ("model, heads", {"unsupported": {"gtp2": "?"}}, "`unsupported` names 'gtp2', which does not exist; did you"),
        ("model, heads", {"unsupported": ["gpt2"]}, "`unsupported` should be a dict, feature: reason"),
        (
            of_pairs(CASE.model(), [], "zero"),
            {},
            "_GeneratorContextManager is one context manager: pass the function",
        ),
        (plain_generator, {}, "plain_generator is a generator: decorate it with contextlib.contextmanager"),
        (coroutine, {}, "coroutine is asynchronous"),
        (asynchronous, {}, "asynchronous is asynchronous"),
        (3, {}, "3 is no function"),
        (type, {}, "type has no signature: pass a function that calls it"),
    ],
)
def test_code_that_cannot_be_called_is_one_line(code: Any, options: Any, problem: str) -> None:
    with pytest.raises(InvalidDeclaration, match=problem) as error:
        adapter_from_context(recording([], code) if isinstance(code, str) else code, **options)
    assert "\n" not in str(error.value)


def test_function_without_prompts_is_refused() -> None:
    with pytest.raises(InvalidDeclaration, match="it has no parameter 'input_ids', and each check uses prompts"):
        adapter_from_function(recording([], "model, heads"))


@pytest.mark.parametrize(
    ("returned", "what"),
    [(None, "NoneType"), (torch.zeros(2, 5), "a tensor of shape [2, 5]"), (torch.zeros(1, 3, 5).numpy(), "ndarray")],
)
def test_function_that_returns_no_logits_fails_by_name(returned: Any, what: str) -> None:
    def answer(model: Any, input_ids: Tensor, heads: Any) -> Any:
        return returned

    problem = re.escape(f"answer returned {what}, but should return logits, a tensor [rows, tokens, vocabulary]")
    with pytest.raises(CheckFailure, match=problem):
        reproduce("smoke", adapter_from_function(answer), CASE)


class Suppresses(contextlib.AbstractContextManager[None]):
    def __init__(self, model: Any, heads: Any) -> None:
        pass

    def __exit__(self, *error: object) -> bool:
        return True


def test_context_that_suppresses_errors_fails_by_name() -> None:
    failing = Case(CASE.decoder, CASE.rows, (), steps=(("open",), ("fail", "before", 0, "ForwardError")))
    with pytest.raises(CheckFailure, match="RuntimeError: Suppresses suppressed an error of the model"):
        reproduce("hygiene.exception", adapter_from_context(Suppresses), failing)


# ---- messages


@contextlib.contextmanager
def does_nothing(model: Any, heads: Any, imputation: str) -> Iterator[None]:
    yield


Mine = adapter_from_context(does_nothing)
WithoutName = adapter_from_context(lambda model, heads: contextlib.nullcontext())


@pytest.mark.parametrize(
    ("factory", "name", "expression"),
    [
        (Mine, "Mine", "Mine"),
        (adapter_from_context(does_nothing), "does_nothing", "adapter_from_context(does_nothing)"),
        (
            adapter_from_context(does_nothing, imputations=("zero",), families=["gpt2"], unsupported={"lfm2": "new"}),
            "does_nothing",
            "adapter_from_context(does_nothing, imputations=('zero',), families=['gpt2'], unsupported={'lfm2': 'new'})",
        ),
        (adapter_from_context(partial(does_nothing)), "does_nothing", "adapter_from_context(does_nothing)"),
        (WithoutName, "WithoutName", "WithoutName"),
    ],
    ids=["held by a variable", "held by none", "with options", "partial", "lambda"],
)
def test_message_names_the_adapter_and_reproduces_the_failure(factory: Any, name: str, expression: str) -> None:
    with pytest.raises(CheckFailure, match=f"^{name} breaks smoke") as failure:
        reproduce("smoke", factory, CASE)
    imports, call = re.findall(r"(?:reproduce: |^  )((?:from|reproduce\().*)", str(failure.value), re.M)
    assert call.startswith(f"reproduce('smoke', {expression}, Case(")
    names: dict[str, Any] = {"Mine": Mine, "WithoutName": WithoutName, "does_nothing": does_nothing}
    with pytest.raises(CheckFailure, match=f"^{name} breaks smoke"):
        exec(f"{imports}\n{call}", names)  # noqa: S102 (what the message shows)


def test_made_adapters_are_parametrized_under_their_names() -> None:
    mark = parametrize_with_checks(Mine, WithoutName, adapter_from_function(run_ablated))
    names = [mark.args[1][number * len(CHECKS)].id for number in range(3)]
    assert names == ["Mine-smoke", "WithoutName-smoke", "run_ablated-smoke"]


@pytest.mark.end_to_end
def test_check_command_takes_three_lines(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    command = (sys.executable, "-m", "ablation", "check")
    pytester.makepyfile(
        my_adapter="""
        from ablation.checks import adapter_from_context
        from my_project import my_hook
        Mine = adapter_from_context(my_hook, imputations=("zero", "mean"))
        """,
        my_project="""
        from contextlib import contextmanager
        from ablation import HeadAblation

        @contextmanager
        def my_hook(model, heads, imputation):
            with HeadAblation(model) as ablation:
                ablation.ablate(heads, imputation)
                yield
        """,
        broken="""
        from ablation.checks import adapter_from_context
        Mine = adapter_from_context(lambda model, layers: None)
        """,
    )
    done = pytester.run(*command, "my_adapter:Mine", "-k", "smoke or locality")
    assert done.ret == 0 and "7 of 7 requirements hold" in done.stdout.str()
    done = pytester.run(*command, "broken:Mine")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.str().strip().startswith("ERROR: implementation broken:Mine: <lambda>(model, layers): the ")
    assert len(done.stderr.str().strip().splitlines()) == 1 and "MODULE:CLASS" not in done.stderr.str()


# ---- mistakes


NAMES = (
    *("PseudoHeads", "BiasGone", "NextHead", "LateBinding", "WrongReshape", "FirstRowOnly", "ChunksOfFour"),
    *("MeanOfBatch", "MeanOfPadding", "MeanOfAblated", "BoolMaskIgnored", "EmptyRowSpoils", "EmptySetIsAll"),
    *("BlanketRemoval", "LostHandle", "WeightsLeft", "GradientsOff", "Reseeds", "MeanInFloat32"),
    *("ZDetached", "GroupedLeft", "LayersByOrder", "HeadTooLarge", "UnknownIsMean", "MaskDropped"),
)
"""Mistakes of every kind that code without a state can have."""


def rejected_by(mutant: type[Mutant], factory: Any, checks: Any) -> list[str]:
    tried = {check.id: try_check(check, factory) for check in checks}
    return [id for id, trial in tried.items() if trial is not None and trial.rejected]


@pytest.mark.mutants
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.__name__ in NAMES], ids=lambda mutant: mutant.__name__)
def test_made_adapter_hides_no_mistake(mutant: type[Mutant]) -> None:
    """The checks reject the same code through the helper as through a class that is written out."""
    with few_examples(examples=10):
        found = {}
        for form, made, written in made_and_written(mutant):
            expected = [BY_ID[mutant.expected_check]]
            found[form] = rejected_by(mutant, written, expected)
            assert rejected_by(mutant, made, expected) == found[form], form
        assert any(found.values())


def test_mistakes_are_those_of_the_mutants() -> None:
    assert set(NAMES) <= {mutant.__name__ for mutant in MUTANTS} and len(set(NAMES)) == len(NAMES) > 20
