"""Processes share the prompts of a study: the result is that of one process, also if one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ablation.processes import Processes
from ablation.results import Result

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
PROMPTS = """\
{"prompt": "Berlin is the capital of", "target": " Germany"}
{"prompt": "Rome is the capital of", "target": " Italy", "control": " the country"}
{"prompt": "Paris is the capital of", "target": " France"}
{"prompt": "Quito is the capital of", "target": " Ecuador"}
{"prompt": "Cairo is the capital of", "target": " Egypt"}
"""


IMPUTATIONS = ["zero", "reference-mean", "resample"]


def sweep(folder: Path, out: str, *launcher: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "prompts.jsonl").write_text(PROMPTS)
    command = [*(launcher or (sys.executable,)), "-m", "ablation", "sweep", "--prompts", "prompts.jsonl", "--out", out]
    command += ["--imputation", *IMPUTATIONS, "--draws", "2", "--positions", "last"]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT | environment, capture_output=True, text=True)


def launcher(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = Result.load(one), Result.load(other)
    assert first.prompts == second.prompts and first.ablations == second.ablations
    assert first.provenance == second.provenance
    for name in first.clean:
        assert np.array_equal(first.clean[name], second.clean[name]), name
        assert np.array_equal(first.ablated[name], second.ablated[name]), name
    assert np.array_equal(first.head_mean, second.head_mean)
    assert (one / "reference.npz").read_bytes() == (other / "reference.npz").read_bytes()
    assert (one / "results.csv").read_bytes() == (other / "results.csv").read_bytes()


def test_process_without_a_launcher_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Processes.current() == Processes(0, 1, 0) and Processes.current().is_first
    Processes.current().wait()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Processes.current() == Processes(0, 1, 0)  # not of torchrun, which sets all three
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Processes.current() == Processes(1, 2, 1) and not Processes.current().is_first


@pytest.mark.end_to_end
def test_two_processes_give_the_bits_of_one(tmp_path: Path) -> None:
    alone = sweep(tmp_path, "alone")
    assert alone.returncode == 0, alone.stderr
    shared = sweep(tmp_path, "shared", *launcher(2))
    assert shared.returncode == 0, shared.stderr
    assert_same_bits(tmp_path / "alone", tmp_path / "shared")
    assert shared.stdout.replace("shared", "alone") == alone.stdout  # only the first process reports


@pytest.mark.end_to_end
@pytest.mark.parametrize("rank", [0, 1])
def test_study_goes_on_after_a_process_died(tmp_path: Path, rank: int) -> None:
    """One of two processes is killed after its first prompt."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        f"if os.environ.get('RANK') == '{rank}':\n"
        "    from ablation.studies.checkpoint import Checkpoint\n"
        "    save = Checkpoint.save\n"
        "    def killed(self, index, result):\n"
        "        save(self, index, result)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    Checkpoint.save = killed\n"
    )
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    died = sweep(tmp_path, "out", *launcher(2), PYTHONPATH=path)
    assert died.returncode != 0 and not (tmp_path / "out" / "sweep.json").exists()
    finished = len(list((tmp_path / "out" / "unfinished").glob("0*")))
    assert 1 <= finished <= 4
    again = sweep(tmp_path, "out", *launcher(2))
    assert again.returncode == 0, again.stderr
    assert sweep(tmp_path, "alone").returncode == 0
    assert_same_bits(tmp_path / "alone", tmp_path / "out")
    assert not (tmp_path / "out" / "unfinished").exists()


@pytest.mark.end_to_end
def test_interrupted_study_says_so_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "from ablation.studies.checkpoint import Checkpoint\n"
        "save = Checkpoint.save\n"
        "def interrupted(self, index, result):\n"
        "    save(self, index, result)\n"
        "    if index == 1:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "Checkpoint.save = interrupted\n"
    )
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    stopped = sweep(tmp_path, "out", PYTHONPATH=path)
    assert stopped.returncode == 128 + signal.SIGINT
    assert "what is finished is kept in out" in stopped.stderr and stopped.stdout == ""
    assert sweep(tmp_path, "out").returncode == 0 and sweep(tmp_path, "alone").returncode == 0
    assert_same_bits(tmp_path / "alone", tmp_path / "out")
