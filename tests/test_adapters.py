"""Models with adapters: the wrapper of a projection is what reads z, so it carries the hook."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation.checks.decoders import Decoder
from ablation.errors import AblationError, ModelUnavailable, UnsupportedModel
from ablation.heads import find_heads
from ablation.hook import HeadAblation
from ablation.models import architecture, load
from ablation.results import Result
from ablation.sweeps import sweep, sweep_sequential
from tests.comparing import ATOL, assert_results_equal
from tests.test_models import folder  # noqa: F401 (fixture)

IDS = [3, 1, 4, 1, 5]
T = torch.tensor([IDS])
PAIR = (1, 2)


class LowRank(nn.Module):
    """The interface of peft's LoRA layer, without its package: a base layer, and a product that is added to it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.disabled = base_layer, False
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        return out if self.disabled else out + self.lora_B(self.lora_A(x))

    def merged(self) -> nn.Linear:
        """The Linear that does the same."""
        linear = copy.deepcopy(self.base_layer)
        if not self.disabled:
            linear.weight.data += self.lora_B.weight.data @ self.lora_A.weight.data
        return linear


class Wrapped(nn.Module):
    """The interface of a PeftModel, without its package."""

    def __init__(self, model: PreTrainedModel, **config: Any) -> None:
        super().__init__()
        self.base_model = model
        known = {"is_prompt_learning": False, "peft_type": SimpleNamespace(value="LORA")}
        self.active_peft_config = SimpleNamespace(**known | config)
        self.peft_config = {"default": self.active_peft_config}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def get_base_model(self) -> PreTrainedModel:
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


def llama() -> PreTrainedModel:
    return Decoder("llama", 3, 4, 8, num_key_value_groups=2).fresh()


def low_rank(disabled: bool = False) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with low-rank adapters, and the same model with them merged."""
    torch.manual_seed(0)
    model, merged = llama(), llama()
    for layer, of in zip(model.model.layers, merged.model.layers, strict=True):
        for name in ("o_proj", "q_proj"):
            adapter = LowRank(getattr(layer.self_attn, name))
            adapter.disabled = disabled
            setattr(layer.self_attn, name, adapter)
            setattr(of.self_attn, name, adapter.merged())
    return model.eval(), merged.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(T, use_cache=False).logits


def assert_ablated_as_merged(model: Any, merged: PreTrainedModel, name: str) -> Result:
    """Assert that the heads of a model with adapters are those of the merged model, in the hook and in sweeps."""
    found = find_heads(model)
    assert (found.shape, found.layer(1).projection_name) == ((3, 4), name)
    assert model.get_submodule(name) is found.layer(1).projection
    for imputation in ("zero", "mean"):
        ablated = []
        for each in (model, merged):
            with HeadAblation(each) as ablation:
                ablation.ablate([PAIR], imputation)
                ablated.append(logits(each))
        assert torch.allclose(ablated[0], ablated[1], atol=1e-5)
        assert not torch.allclose(ablated[0], logits(model), atol=1e-3)
    swept = sweep(model, IDS)
    assert swept.provenance["method"] == "growing batch"
    assert_results_equal(swept, sweep_sequential(model, IDS), ATOL["float32"])
    assert_results_equal(swept, sweep(merged, IDS), ATOL["float32"])
    return swept


@pytest.mark.parametrize("disabled", [False, True])
def test_low_rank_wrapper_is_ablated_as_its_merged_weights(disabled: bool) -> None:
    model, merged = low_rank(disabled)
    inner = assert_ablated_as_merged(model, merged, "model.layers.1.self_attn.o_proj")
    outer = assert_ablated_as_merged(Wrapped(model).eval(), merged, "base_model.model.layers.1.self_attn.o_proj")
    assert np.array_equal(inner.ablated["argmax"], outer.ablated["argmax"])
    moved = np.abs(sweep(llama(), IDS).ablated["margin"] - inner.ablated["margin"]).max()
    assert (moved > 1e-3) == (not disabled)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Wrapped(llama(), is_prompt_learning=True), r"^Wrapped adds virtual tokens to the prompt \(LORA\)$"),
        (lambda: Wrapped(llama(), peft_type=SimpleNamespace(value="XLORA")), "^Wrapped runs its decoder twice"),
        (lambda: nn.DataParallel(llama()), "^DataParallel .*pass the original model, its .module$"),
        (lambda: SimpleNamespace(model=llama()), "^SimpleNamespace .*pass the original model, its .model$"),
        (
            lambda: torch.compile(llama(), backend="eager"),
            "^OptimizedModule .*pass the original model, its ._orig_mod$",
        ),
        (lambda: None, "^NoneType is not a transformers model$"),
        (lambda: "gpt2", r"^'gpt2' is a name, not a model: pass ablation.load\('gpt2'\).model$"),
        (lambda: nn.ReLU(), "^ReLU is not a transformers model$"),
        (lambda: llama, "^function is not a transformers model$"),
    ],
    ids=["prompt learning", "XLORA", "data parallel", "loaded", "compiled", "none", "name", "module", "function"],
)
def test_object_that_is_no_model_is_refused_with_advice(make: Callable[[], Any], reason: str) -> None:
    for act in (find_heads, HeadAblation, lambda model: sweep(model, IDS)):
        with pytest.raises(UnsupportedModel, match=reason):
            act(make())


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="peft is not installed: pip install peft")


def trained(peft: Any, model: PreTrainedModel, config: Any, name: str = "default") -> Any:
    """A PeftModel whose adapter does something: a new one does nothing."""
    wrapped = peft.get_peft_model(model, config, adapter_name=name).eval()
    randomise(wrapped)
    return wrapped


def randomise(wrapped: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 5)


LINEAR: dict[str, Callable[[Any], Any]] = {
    "LoRA on all": lambda p: p.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "LoRA on o_proj": lambda p: p.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"),
    "LoRA elsewhere": lambda p: p.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "DoRA": lambda p: p.LoraConfig(r=2, target_modules=["o_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "IA3": lambda p: p.IA3Config(target_modules=["o_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "IA3 of inputs": lambda p: p.IA3Config(
        target_modules=["o_proj"], feedforward_modules=["o_proj"], task_type="CAUSAL_LM"
    ),
    "VeRA": lambda p: p.VeraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"),
    "LoHa": lambda p: p.LoHaConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"),
    "OFT": lambda p: p.OFTConfig(r=0, oft_block_size=4, target_modules=["o_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("kind", LINEAR)
def test_adapter_of_peft_is_ablated_as_its_merged_weights(peft: Any, kind: str) -> None:
    wrapped = trained(peft, llama(), LINEAR[kind](peft))
    merged = copy.deepcopy(wrapped).merge_and_unload()
    assert_ablated_as_merged(wrapped, merged, "base_model.model.model.layers.1.self_attn.o_proj")
    assert_ablated_as_merged(wrapped.get_base_model(), merged, "model.layers.1.self_attn.o_proj")
    assert not torch.allclose(logits(merged), logits(llama()), atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_only_active_adapters_of_peft_count(peft: Any) -> None:
    wrapped = trained(peft, llama(), LINEAR["LoRA on all"](peft), "one")
    wrapped.add_adapter("two", LINEAR["LoRA on o_proj"](peft))
    wrapped.set_adapter("two")
    randomise(wrapped.eval())
    outer = "base_model.model.model.layers.1.self_attn.o_proj"
    of_two = copy.deepcopy(wrapped).merge_and_unload(adapter_names=["two"])
    of_one = copy.deepcopy(wrapped).merge_and_unload(adapter_names=["one"])
    assert_ablated_as_merged(wrapped, of_two, outer)
    wrapped.set_adapter("one")
    assert_ablated_as_merged(wrapped, of_one, outer)
    with wrapped.disable_adapter():
        assert_ablated_as_merged(wrapped, llama(), outer)
    wrapped.merge_adapter()
    assert_ablated_as_merged(wrapped, of_one, outer)


@pytest.mark.filterwarnings("ignore")
def test_copied_projection_of_peft_is_the_one_that_is_hooked(peft: Any) -> None:
    """`modules_to_save` trains a copy of the projection, and keeps the original beside it."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"], task_type="CAUSAL_LM")
    wrapped = trained(peft, llama(), config)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    assert_ablated_as_merged(wrapped, merged, "base_model.model.model.layers.1.self_attn.o_proj")


@pytest.mark.filterwarnings("ignore")
def test_adapter_of_peft_on_the_embedding_is_swept(peft: Any) -> None:
    for given in (dict(trainable_token_indices=[1, 2]), dict(modules_to_save=["embed_tokens", "lm_head"])):
        config = peft.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM", **given)
        wrapped = trained(peft, llama(), config)
        merged = copy.deepcopy(wrapped).merge_and_unload()
        assert_ablated_as_merged(wrapped, merged, "base_model.model.model.layers.1.self_attn.o_proj")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"])
def test_adapter_of_peft_that_adds_tokens_is_refused(peft: Any, kind: str) -> None:
    config = getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(llama(), config).eval()
    with pytest.raises(UnsupportedModel, match="^PeftModelForCausalLM adds virtual tokens to the prompt"):
        sweep(wrapped, IDS)


@pytest.mark.filterwarnings("ignore")
def test_adapter_of_peft_that_calls_the_projection_is_refused(peft: Any) -> None:
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(llama(), config).eval()
    with pytest.raises(AblationError, match="o_proj was called 2 times|2 attention output projections"):
        sweep(wrapped, IDS)


@pytest.fixture
def adapter(peft: Any, folder: Path, tmp_path: Path) -> Path:  # noqa: F811
    """The folder of an adapter of the model in `folder`, as peft writes it."""
    config = peft.LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    trained(peft, load(str(folder)).model, config).save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


@pytest.mark.filterwarnings("ignore")
def test_folder_of_an_adapter_is_loaded_with_its_base(peft: Any, folder: Path, adapter: Path) -> None:  # noqa: F811
    loaded, base = load(str(adapter)), load(str(folder))
    assert loaded.name == "tuned" and not loaded.model.training
    assert loaded.decode(5) == base.decode(5)
    merged = copy.deepcopy(loaded.model).merge_and_unload()
    result = sweep(loaded.model, IDS)
    assert_results_equal(result, sweep(merged, IDS), ATOL["float32"])
    assert result.provenance["architecture"] == "PeftModelForCausalLM"
    assert np.abs(result.ablated["margin"] - sweep(base.model, IDS).ablated["margin"]).max() > 1e-3
    assert find_heads(architecture(str(adapter))).shape == (2, 3)


@pytest.mark.filterwarnings("ignore")
def test_tokenizer_of_an_adapter_is_preferred(folder: Path, adapter: Path) -> None:  # noqa: F811
    tokenizer = load(str(folder)).tokenizer
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(adapter)
    assert load(str(adapter)).tokenizer.convert_tokens_to_ids("<|new|>") == len(tokenizer) - 1


def no_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def bad_json(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")


def no_base(adapter: Path) -> None:
    change(adapter, base_model_name_or_path=None)


def itself(adapter: Path) -> None:
    change(adapter, base_model_name_or_path=str(adapter))


def missing_base(adapter: Path) -> None:
    change(adapter, base_model_name_or_path="/nowhere/at/all")


def other_weights(adapter: Path) -> None:
    change(adapter, target_modules=["c_attn"])


def unknown_method(adapter: Path) -> None:
    change(adapter, peft_type="NOTHING")


def change(adapter: Path, **given: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | given))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (no_weights, "cannot load an adapter from .*: it has no adapter_model.safetensors"),
        (bad_json, "adapter_config.json names no base model"),
        (no_base, "adapter_config.json names no base model"),
        (itself, "its base, .*, is an adapter, too"),
        (missing_base, "cannot load a model from /nowhere/at/all: it does not exist"),
        (other_weights, "cannot load tuned: UserWarning: Found missing adapter keys"),
        (unknown_method, "cannot load tuned: "),
    ],
)
def test_damaged_adapter_is_refused_in_one_line(adapter: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(adapter)
    with pytest.raises(ModelUnavailable, match=reason) as error:
        load(str(adapter))
    assert "\n" not in str(error.value)


def test_adapter_without_peft_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "capitals"}')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelUnavailable, match="holds an adapter, which needs the package peft: pip install peft$"):
        load(str(tmp_path))
