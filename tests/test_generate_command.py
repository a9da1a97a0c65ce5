"""The command `ablation generate`, as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ablation import generate
from ablation.cli import main
from ablation.models import LoadedModel
from ablation.studies import generation
from ablation.studies.sampling import Sampling
from tests.test_cli import modules_after

Run = Callable[..., tuple[int, str, str]]
PAIR = ("--heads", "L0H8 L0H9", "--max-new-tokens", "6")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `ablation generate` in an empty folder. Returns status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["generate", *arguments])
        return status, *capsys.readouterr()

    return run


def write_prompts(*records: dict[str, Any]) -> None:
    Path("mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_texts_are_printed_with_the_place_where_they_part(run: Run) -> None:
    status, out, err = run(*PAIR)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "capitals: 'Berlin is the capital of'"
    assert "clean      '‖ Germany.'\nablated    '‖ the country of Germany.'\n" in out
    assert (
        "new token 0 (position 5): clean ' Germany', ahead by 0.90 logits; ablated ' the', ahead by 1.00 logits" in out
    )
    assert "receipt    6 forward passes of the ablated model, 160 elements of z replaced, 160 changed" in out
    assert list(Path().iterdir()) == []


def test_less_probable_token_of_a_sampled_text_is_behind(run: Run) -> None:
    _, out, _ = run(*PAIR, "--prompt", "Rome is", "--sample", "--temperature", "2", "--seed", "3")
    assert "sampled (temperature 2, seed 3)" in out
    assert "clean ' capital', behind by 7.53 logits; ablated ' a', ahead by 9.06 logits" in out


def test_equal_texts_are_printed_once(run: Run) -> None:
    _, out, _ = run("--heads", "L3H0", "--prompt", "Paris is the capital of")
    assert "both       ' France.'\n" in out and "clean" not in out


def test_mark_is_after_what_both_texts_begin_with(run: Run) -> None:
    _, out, _ = run("--heads", "L0H8 L0H9", "--imputation", "channel-mean")
    assert (
        "clean      ' Germany‖.'\nablated    \" Germany‖'s capital" in out
        and "new token 1 (position 6): clean '.'" in out
    )


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ([], {}),
        (["--imputation", "mean"], {"imputation": "mean"}),
        (["--positions", "last"], {"positions": "last"}),
        (["--positions", "prompt"], {"positions": "prompt"}),
        (["--positions", "-2,0"], {"positions": [-2, 0]}),
        (["--sample"], {"sampling": Sampling()}),
        (
            ["--sample", "--temperature", "2", "--top-p", "0.9", "--top-k", "30", "--seed", "5"],
            {"sampling": Sampling(2.0, 0.9, 30), "seed": 5},
        ),
        (
            ["--imputation", "reference-mean", "--reference", "mine.jsonl"],
            {"imputation": "reference-mean", "reference": [{"prompt": "Rome is"}, {"prompt": "Paris is"}]},
        ),
    ],
    ids=" ".join,
)
def test_options_reach_the_generation(
    run: Run, capitals: LoadedModel, arguments: list[str], keywords: dict[str, Any]
) -> None:
    write_prompts({"prompt": "Rome is"}, {"prompt": "Paris is"})
    status, out, err = run(*PAIR, "--json", *arguments)
    assert (status, err) == (0, "")
    (found,) = json.loads(out)["generations"]
    prompt = [{"prompt": "Berlin is the capital of", "target": " Germany"}]
    (wanted,) = generate(capitals, prompt, [(0, 8), (0, 9)], max_new_tokens=6, **keywords)
    assert (tuple(found["clean"]), tuple(found["ablated"])) == (wanted.clean, wanted.ablated)
    assert (found["clean_text"], found["ablated_text"]) == (wanted.clean_text, wanted.ablated_text)
    assert (found["replaced"], found["target"]) == (wanted.replaced, " Germany")
    if wanted.parts_at is not None:
        assert found["parts_at"]["new_token"] == wanted.parts_at
        assert found["parts_at"]["position"] == 5 + wanted.parts_at
        assert found["parts_at"]["clean_margin"] == wanted.clean_margin


def test_data_set_is_summarised_and_written_line_by_line(run: Run) -> None:
    prompts = [
        {"prompt": "Berlin is the capital of", "target": " Germany.", "group": "Europe"},
        {"prompt": "Paris is the capital of", "target": "France"},
        {"prompt": "Rome is"},
    ]
    write_prompts(*prompts)
    status, out, err = run(*PAIR, "--prompts", "mine.jsonl", "--out", "answers.jsonl")
    assert (status, err) == (0, "")
    assert "capitals: 3 prompts" in out and "texts      1 of 3 change" in out
    assert "exact      the text equals the target: clean 1 of 2 [9.5%, 90.5%], ablated 0 of 2 [0.0%, 65.8%]" in out
    assert "1 lose it, 0 gain it (McNemar's exact test: p = 1)" in out
    assert "The texts are in answers.jsonl, summary and provenance in answers.json" in out
    lines = [json.loads(line) for line in Path("answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == [prompt["prompt"] for prompt in prompts]
    assert [line["group"] for line in lines] == ["Europe", None, None]
    assert [line["clean_exact"] for line in lines] == [True, False, None]
    assert [line["ablated_exact"] for line in lines] == [False, False, None]
    assert [line["ablated_contains"] for line in lines] == [True, True, None]
    assert lines[0]["parts_at"]["ablated"] == " the" and lines[1]["parts_at"] is None
    beside = json.loads(Path("answers.json").read_text(encoding="utf-8"))
    assert beside["lines"] == "answers.jsonl" and beside["summary"]["answers"]["exact"]["lost"] == 1
    made_with = beside["provenance"]
    assert (made_with["model"], made_with["heads"]) == ("capitals", [[0, 8], [0, 9]])
    assert made_with["asked"]["prompts"] == 3 and made_with["sampling"] is None


def test_first_texts_that_part_are_printed(run: Run) -> None:
    write_prompts(*[{"prompt": "Berlin is the capital of"}] * 7, {"prompt": "Paris is the capital of"})
    _, out, _ = run(*PAIR, "--prompts", "mine.jsonl")
    assert out.count("'Berlin is the capital of'") == 5 and "and 2 more; --out" in out and "Paris" not in out


def test_files_are_kept_unless_they_may_be_overwritten(run: Run) -> None:
    arguments = (*PAIR, "--out", "answers.jsonl")
    Path("answers.json").write_text("mine")
    status, _, err = run(*arguments)
    assert status == 2 and "cannot write to answers.json: it exists already" in err
    assert [path.name for path in Path().iterdir()] == ["answers.json"]
    assert run(*arguments, "--overwrite")[0] == 0
    before = Path("answers.jsonl").read_bytes()
    status, _, err = run(*arguments, "--prompt", "Rome is")
    assert status == 2 and "answers.jsonl: it exists already: choose another name, or pass --overwrite" in err
    assert run(*arguments, "--overwrite", "--prompt", "Gondor is")[0] == 2
    assert Path("answers.jsonl").read_bytes() == before, "an error before the first text loses nothing"
    assert run(*arguments, "--overwrite", "--prompt", "Rome is")[0] == 0
    assert Path("answers.jsonl").read_bytes() != before


def test_interruption_keeps_the_finished_prompts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prompts(*({"prompt": f"{city} is the capital of"} for city in ("Berlin", "Paris", "Rome")))
    own, calls = generation.Generations._generation, []

    def interrupted_at_third(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(*arguments)

    monkeypatch.setattr(generation.Generations, "_generation", interrupted_at_third)
    status, out, err = run(*PAIR, "--prompts", "mine.jsonl", "--out", "answers.jsonl")
    assert (status, out) == (130, "")
    assert err == "ablation: interrupted, 2 of 3 prompts are in answers.jsonl\n"
    assert len(Path("answers.jsonl").read_text().splitlines()) == 2 and not Path("answers.json").exists()


def test_interruption_without_a_file_writes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generation.Generations, "_generation", interrupt)
    assert run(*PAIR)[::2] == (130, "ablation: interrupted, nothing written\n")


def test_bad_prompts_are_left_out_with_a_note(run: Run) -> None:
    write_prompts({"prompt": "Rome is"}, {"prompt": "Gondor is"}, {"target": "a"})
    status, out, err = run(*PAIR, "--prompts", "mine.jsonl", "--skip-bad", "--json")
    assert status == 0 and len(json.loads(out)["generations"]) == 1
    assert err.startswith("ablation: note: 2 prompts are left out: mine.jsonl, line 3") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--heads", "nonsense"], "'nonsense'"),
        (["--heads", ""], ""),
        (["--temperature", "2"], "--temperature is for sampled text: pass --sample, too"),
        (["--seed", "2"], "--seed is for sampled text: pass --sample, too"),
        (["--top-k", "2"], "--top-k is for sampled text"),
        (["--sample", "--top-p", "1.5"], "top_p is 1.5: it is a probability"),
        (["--sample", "--temperature", "0"], "the temperature is 0.0: it is a number above 0"),
        (["--sample", "--top-k", "0"], "top_k is 0: it is a number of tokens"),
        (["--imputation", "resample"], "resample takes z from a prompt of equal length"),
        (["--imputation", "reference-mean"], "takes z from other prompts: pass them with --reference FILE"),
        (["--reference", "capitals"], "--reference is for an --imputation of other prompts"),
        (["--positions", "subject"], "--positions is all, last, integers such as 0,3,-1, or a column"),
        (["--out", "answers.txt"], "--out 'answers.txt' does not end with .jsonl"),
        (["--out", "nowhere/answers.jsonl"], "cannot write to nowhere/answers.jsonl: there is no folder"),
        (["--overwrite"], "--overwrite replaces files: pass --out FILE.jsonl"),
        (["--prompts", "capitals", "--prompt", "a"], "--prompts and --prompt exclude each other"),
        (["--prompts", "nowhere.csv"], "cannot read prompts from nowhere.csv"),
        (["--skip-bad"], "--skip-bad leaves out prompts of a file"),
        (["--model", "./nowhere"], "cannot load a model from nowhere: it does not exist"),
    ],
)
def test_bad_arguments_are_reported_before_loading(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], reason: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("ablation.models.load", fail)
    status, out, err = run(*PAIR, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("ablation: ") and reason in err and err.count("\n") == 1
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--heads", "L12H0"], "layer 12"),
        (["--chat"], "this model has no chat template"),
        (["--max-new-tokens", "40"], "the model takes at most 32, so it can generate at most 28 new tokens, not 40"),
        (["--positions", "9"], "the prompt has 5 tokens, so it has no position 9"),
        (
            ["--imputation", "reference-mean-by-position", "--reference", "capitals"],
            "with its new tokens, the prompt has 10 tokens, and 'reference-mean-by-position' has values for 5 position",
        ),
    ],
)
def test_what_the_model_does_not_allow_is_one_line(run: Run, arguments: list[str], reason: str) -> None:
    status, out, err = run(*PAIR, *arguments, "--out", "answers.jsonl")
    assert (status, out) == (2, "") and reason in err and err.count("\n") == 1
    assert list(Path().iterdir()) == []


def test_other_processes_of_a_launcher_write_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert run(*PAIR, "--out", "answers.jsonl") == (0, "", "")
    assert list(Path().iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--heads", "H1"], "'H1'"),
        (["--heads", "L0H1", "--imputation", "resample"], "resample takes z from a prompt of equal length"),
        (["--heads", "L0H1", "--sample", "--top-p", "2"], "top_p is 2.0"),
    ],
)
def test_bad_arguments_precede_heavy_imports(arguments: list[str], reason: str) -> None:
    status, out, modules = modules_after("generate", *arguments)
    assert (status, modules) == (2, set()) and reason in out
