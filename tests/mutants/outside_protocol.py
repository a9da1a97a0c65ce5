"""Bugs that no adapter can show, and the test of this project that fails for each."""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    """A bug that the specification cannot see. test: the test of this project that fails for it."""

    name: str
    cause: str
    test: str
    source: str = ""


OUTSIDE_PROTOCOL = (
    Bug(
        "WidthFromConfig",
        "Uses config.head_dim for the channels of z, which is wrong for latent attention.",
        "tests/test_heads.py::test_head_dim_is_what_the_projection_reads",
    ),
    Bug(
        "Compiled",
        "Hooks a module that was compiled earlier, so that its hooks may never fire.",
        "tests/test_heads.py::test_unsupported_model_is_refused_with_the_reason",
        "pytorch/pytorch#117758",
    ),
    Bug(
        "SharedProjection",
        "Ablates one layer of a model whose layers share one module.",
        "tests/test_heads.py::test_unsupported_model_is_refused_with_the_reason",
    ),
    Bug(
        "CalledByKeyword",
        "Expects z as a positional argument of the projection.",
        "tests/test_hook.py::test_projection_may_be_called_by_keyword",
        "pytorch/pytorch#35643",
    ),
    Bug(
        "NotCalled",
        "Accepts a forward pass that never called the projection as an ablated one.",
        "tests/test_hook.py::test_projection_that_is_not_called_is_an_error",
        "TransformerLensOrg/TransformerLens#1256",
    ),
    Bug(
        "MeanOfAPiece",
        "Computes the mean of the tokens in one forward pass, although others are in a cache.",
        "tests/test_hook.py::test_mean_of_a_cached_sequence_is_refused",
        "stanfordnlp/pyvene#193",
    ),
    Bug(
        "CacheRenamed",
        "Looks for a cache under the name that it has in another version of transformers.",
        "tests/test_hook.py::test_mean_of_a_cached_sequence_is_refused",
    ),
    Bug(
        "Nested",
        "Lets a second ablation join the first on one model.",
        "tests/test_refusals.py::test_second_ablation_is_refused_and_the_first_persists",
        "TransformerLensOrg/TransformerLens#1098",
    ),
    Bug(
        "WrongCells",
        "Assigns the rows of a later pass to the ablations of the first.",
        "tests/test_sweep.py::test_sweep_equals_sequential_sweep",
    ),
    Bug(
        "TransposedMap",
        "Fills the map as [head, layer] instead of [layer, head], which a grid of 12 x 12 hides.",
        "tests/test_sweep.py::test_each_cell_is_the_single_ablation_of_that_head",
    ),
    Bug(
        "TransposedFigure",
        "Draws the map with layers and heads exchanged.",
        "tests/test_figures.py::test_target_and_control_have_a_scale_each",
    ),
    Bug(
        "AblatedBaseline",
        "Measures the clean run with a head off.",
        "tests/test_sweep.py::test_clean_values_are_those_of_a_model_without_hooks",
    ),
    Bug(
        "RowsSeeEachOther",
        "Accepts a batch in which rows depend on each other.",
        "tests/test_engine.py::test_rows_that_see_each_other_are_noticed",
        "ndif-team/nnsight#722",
    ),
    Bug(
        "PromptsMixedUp",
        "Gives one prompt the result of another.",
        "tests/test_sweep.py::test_each_prompt_is_its_own_sweep",
    ),
    Bug(
        "WeightsElsewhere",
        "Ignores that accelerate keeps weights elsewhere until they are needed.",
        "tests/test_devices.py::test_offloaded_weights_give_identical_results",
        "huggingface/accelerate#3127",
    ),
    Bug(
        "NoEffectIsRobust",
        "Reports a hook that changed nothing as a robust model.",
        "tests/test_engine.py::test_hook_that_changes_nothing_is_no_robust_model",
        "TransformerLensOrg/TransformerLens#1688",
    ),
    Bug(
        "NanIsRobust",
        "Reports the argmax of logits that are not finite.",
        "tests/test_refusals.py::test_non_finite_clean_logits_are_refused",
    ),
    Bug(
        "TieAtRandom",
        "Lets rounding choose among equally probable tokens.",
        "tests/test_measure.py::test_lowest_of_equal_tokens_is_the_prediction",
    ),
    Bug(
        "DropoutOn",
        "Sweeps a model in training mode.",
        "tests/test_refusals.py::test_refusal_precedes_any_forward_and_leaves_nothing",
    ),
    Bug(
        "FirstOfSeveralTokens",
        "Uses the first token of a target of several tokens.",
        "tests/test_metrics.py::test_every_metric_equals_one_hooked_forward_each",
        "kanishkamisra/minicons#2",
    ),
    Bug(
        "TokenBeforeThePrompt",
        "Adds a token before the prompt that the tokenizer does not add.",
        "tests/test_prompts.py::test_prompt_keeps_the_tokens_of_its_tokenizer",
        "TransformerLensOrg/TransformerLens#282",
    ),
    Bug(
        "ShiftedNumbers",
        "Changes every number a little in a refactoring.",
        "tests/test_golden.py::test_target_sensitivity",
        "huggingface/transformers#41620",
    ),
    Bug(
        "BlindSpecification",
        "Compares tensors, and discards the result.",
        "tests/test_mutants.py::test_mutant_is_rejected",
        "stanfordnlp/pyvene@42c5550",
    ),
    Bug(
        "OwnErrorBlamedOnTheModel",
        "Takes an error in its own hook for a model that accepts no batches, and falls back to a slow way.",
        "tests/test_engine.py::test_error_in_our_own_hook_propagates",
    ),
    Bug(
        "CompiledAround",
        "Registers hooks on a model that a compiled function calls, which omits them.",
        "tests/test_module_hooks.py::test_compiled_code_around_the_model_is_ablated",
        "pytorch/pytorch#117758",
    ),
    Bug(
        "OtherObject",
        "Ablates one object, while another one, such as a copy or a pipeline's own model, is run.",
        "tests/test_module_hooks.py::test_ablation_of_another_object_is_an_error_on_leaving",
    ),
    Bug(
        "OtherThreads",
        "Ablates the forward passes of every thread that uses the model.",
        "tests/test_module_hooks.py::test_other_threads_get_the_models_own_logits",
    ),
    Bug(
        "PickledHooks",
        "Leaves its hooks in a pickle of the model.",
        "tests/test_module_hooks.py::test_copy_made_inside_carries_no_ablation",
    ),
    Bug(
        "PackedMean",
        "Takes one mean over a row that holds several packed sequences.",
        "tests/test_edits.py::test_mean_of_packed_rows_is_refused",
    ),
    Bug(
        "WritesIgnored",
        "Assigns to a tensor subclass that ignores the assignment.",
        "tests/test_edits.py::test_elements_that_are_not_replaced_are_an_error",
    ),
    Bug(
        "RecomputedUnderOthers",
        "Ablates other heads when gradient checkpointing runs a layer again in the backward pass.",
        "tests/test_checkpointing.py::test_layers_are_recomputed_as_they_were_recorded",
    ),
    Bug(
        "RowsCoupled",
        "Ablates many heads in one batch of a model whose rows influence each other.",
        "tests/test_guard.py::test_weak_influence_between_rows_is_noticed",
    ),
    Bug(
        "BehindTheEnd",
        "Asks what follows the EOS that a tokenizer appends.",
        "tests/test_prompts.py::test_added_tokens_stay_at_the_start_and_not_at_the_end",
    ),
    Bug(
        "NotCausal",
        "Sweeps an encoder, whose logits depend on later tokens.",
        "tests/test_causality.py::test_model_that_does_not_continue_a_prompt_is_refused",
    ),
)
