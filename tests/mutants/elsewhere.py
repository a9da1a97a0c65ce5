"""Bugs that are none of the protocol, and the test of this project that fails where it has them."""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    """A bug that the specification cannot see. test: of this project, which fails for it."""

    name: str
    cause: str
    test: str
    source: str = ""


ELSEWHERE = (
    Bug(
        "WidthFromConfig",
        "Takes config.head_dim for the width of z, which with latent attention it is not.",
        "tests/test_heads.py::test_the_width_of_a_head_is_what_the_projection_reads",
    ),
    Bug(
        "Compiled",
        "Hooks a module after it was compiled, whose hooks may then never fire.",
        "tests/test_heads.py::test_a_model_whose_heads_cannot_be_ablated_honestly_is_refused",
        "pytorch/pytorch#117758",
    ),
    Bug(
        "SharedProjection",
        "Ablates one layer of a model whose layers are all the same module.",
        "tests/test_heads.py::test_a_model_whose_heads_cannot_be_ablated_honestly_is_refused",
    ),
    Bug(
        "CalledByKeyword",
        "Expects z as a positional argument of the projection.",
        "tests/test_hook.py::test_it_works_where_the_projection_is_called_by_keyword",
        "pytorch/pytorch#35643",
    ),
    Bug(
        "NotCalled",
        "Takes a forward in which the projection was never called for one that was ablated.",
        "tests/test_hook.py::test_a_projection_that_is_not_called_is_an_error_not_a_robust_model",
        "TransformerLensOrg/TransformerLens#1256",
    ),
    Bug(
        "MeanOfAPiece",
        "Takes the mean of the tokens in one forward, where the others are in a cache.",
        "tests/test_hook.py::test_a_mean_over_a_sequence_that_comes_in_pieces_is_refused",
        "stanfordnlp/pyvene#193",
    ),
    Bug(
        "CacheRenamed",
        "Looks for a cache under the name that it has in another version of the model's library.",
        "tests/test_hook.py::test_a_mean_over_a_sequence_that_comes_in_pieces_is_refused",
    ),
    Bug(
        "Nested",
        "Lets a second ablation join the first on one model.",
        "tests/test_refusals.py::test_a_second_ablation_is_refused_and_the_first_goes_on",
        "TransformerLensOrg/TransformerLens#1098",
    ),
    Bug(
        "WrongCells",
        "Puts the rows of a later pass into the cells of the first.",
        "tests/test_sweep.py::test_the_growing_batch_equals_the_double_loop",
    ),
    Bug(
        "TransposedMap",
        "Fills the map [head, layer] for [layer, head], which a grid of 12 x 12 hides.",
        "tests/test_sweep.py::test_a_cell_of_the_sweep_is_the_single_ablation_of_that_head",
    ),
    Bug(
        "TransposedFigure",
        "Draws the map with layers for heads.",
        "tests/test_figures.py::test_the_maps_show_the_changes_in_percentage_points_on_one_scale_symmetric_about_0",
    ),
    Bug(
        "AblatedBaseline",
        "Measures the clean run with a head off.",
        "tests/test_sweep.py::test_head_means_and_clean_values_are_those_of_a_model_without_hooks",
    ),
    Bug(
        "RowsSeeEachOther",
        "Believes a batch in which rows depend on each other.",
        "tests/test_sweep.py::test_a_model_whose_rows_see_each_other_is_swept_sequentially",
        "ndif-team/nnsight#722",
    ),
    Bug(
        "PromptsMixedUp",
        "Gives one of several prompts the rows of another.",
        "tests/test_sweep.py::test_several_prompts_give_what_each_gives_alone",
    ),
    Bug(
        "WeightsElsewhere",
        "Reads weights, or places inputs, where accelerate has them somewhere else until they are needed.",
        "tests/test_devices.py::test_a_model_whose_weights_wait_on_disk_gives_the_same_with_every_receipt",
        "huggingface/accelerate#3127",
    ),
    Bug(
        "NoEffectIsRobust",
        "Counts a hook that changed nothing as a model that nothing moves.",
        "tests/test_sweep.py::test_a_hook_that_changes_nothing_is_not_taken_for_a_robust_model",
        "TransformerLensOrg/TransformerLens#1688",
    ),
    Bug(
        "NanIsRobust",
        "Takes the argmax of logits that are not finite.",
        "tests/test_refusals.py::test_logits_that_are_not_finite_are_refused_by_the_forward_that_gives_them",
    ),
    Bug(
        "TieAtRandom",
        "Takes any of equally probable tokens for the prediction.",
        "tests/test_sweep.py::test_of_equal_logits_the_lowest_token_is_the_prediction",
    ),
    Bug(
        "DropoutOn",
        "Sweeps a model in training mode.",
        "tests/test_refusals.py::test_it_is_refused_before_any_forward_and_leaves_nothing",
    ),
    Bug(
        "FirstOfSeveralTokens",
        "Takes the first token of a target that is several.",
        "tests/test_models.py::test_a_target_that_is_not_one_token_is_refused_with_what_may_be_meant",
        "kanishkamisra/minicons#2",
    ),
    Bug(
        "TokenBeforeThePrompt",
        "Puts a token before the prompt that the model's own tokenizer does not.",
        "tests/test_models.py::test_a_prompt_keeps_the_tokenizers_own_tokens",
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
        "Compares tensors, and throws the result away.",
        "tests/test_mutants.py::test_a_mutant_is_rejected_for_a_requirement_that_it_breaks",
        "stanfordnlp/pyvene@42c5550",
    ),
)
