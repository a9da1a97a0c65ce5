"""The folder of a result: its files appear together, and no other file is ever replaced or deleted.

A result is complete if sweep.json is there. It names the other files with their SHA-256: a file of this list is ours,
every other file is somebody else's. Importing this module is cheap.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ablation.errors import InvalidOutput, one_line

MANIFEST = "sweep.json"
UNFINISHED = "unfinished"
"""The folder, in that of a result, for the finished prompts of an unfinished run; see `ablation.studies.checkpoint`."""
REFERENCE = "reference.npz"
FILES = (
    MANIFEST,
    *("sweep.npz", REFERENCE),
    *("results.csv", "results.parquet", "curve.csv", "pairs.csv", "top_tokens.csv", "report.html"),
    *(
        "sensitivity.png",
        "agreement.png",
        "histograms.png",
        "head_means.png",
        "margins.png",
        "strongest.png",
        "loss.png",
        "sets.png",
        "curve.png",
        "interactions.png",
    ),
)
"""The files that a result may have."""

IDENTITY = ("source", "revision", "weights_sha256", "asked")
"""What a repeated sweep has in common with the result that it replaces, besides the ablations and the prompts."""


def check_output(name: str, asked: Mapping[str, Any], source: str, *, overwrite: bool) -> Path:
    """Return the folder of that name, which a result can be written to; `~` is the home folder.

    asked, source: the question and the model, as in the provenance of the result. Raises InvalidOutput if the folder
    cannot be written, or holds another result or another file of the same name.
    """
    if not name:
        raise InvalidOutput("the output folder has an empty name: pass --out FOLDER")

    def is_same(old: Mapping[str, Any]) -> bool:
        return (old["provenance"].get("asked"), old["provenance"].get("source")) == (asked, source)

    try:
        out = Path(name).expanduser()
        with staging(out):
            pass
        if out.exists():
            _replaceable_files(out, FILES, overwrite, is_same)
    except InvalidOutput:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user, or a loop of links
        raise InvalidOutput(f"cannot write to {one_line(name)}: {getattr(error, 'strerror', None) or error}") from error
    return out


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A new folder in the file system of `out`, for `publish`; nothing of it remains. Raises OSError."""
    existing = next(path for path in (out, *out.absolute().parents) if _exists(path))
    if not existing.is_dir():
        problem = "is not a folder" if existing.exists() else "is a link that leads nowhere"
        raise InvalidOutput(f"cannot write to {out}: {existing} {problem}")
    temporary = tempfile.mkdtemp(dir=existing, prefix=".ablation-")
    try:
        draft = Path(temporary, "result")  # unlike the folder around it, it has the permissions of any new folder
        draft.mkdir()
        yield draft
    finally:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
        except KeyboardInterrupt:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def publish(draft: Path, out: Path, content: Mapping[str, Any], *, overwrite: bool) -> None:
    """Move the files of `draft` to `out`, all or none, with `content` as sweep.json.

    An earlier result in `out` is replaced if it has the same ablations, prompts and `IDENTITY`, or with `overwrite`.
    Raises InvalidOutput if it may not be replaced, and OSError.
    """
    files = {path.name: sha256(path) for path in sorted(draft.iterdir())}
    text = json.dumps({**content, "files": files}, indent=2, ensure_ascii=False)
    # A file name that is not UTF-8 becomes an escape that JSON knows.
    (draft / MANIFEST).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not _exists(out):
        try:
            draft.rename(out)
            return
        except OSError:
            if not out.is_dir():  # otherwise another process has just made it
                raise
    identity = _identity(content)
    with _locked(out):
        new_files = [MANIFEST, *files]
        earlier = _replaceable_files(
            out, new_files, overwrite, lambda old: identity is not None and _identity(old) == identity
        )
        _replace(draft, out, earlier)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(content: Mapping[str, Any]) -> Any:
    """Return what distinguishes a result from others, as JSON holds it; None if its model is not recorded."""
    provenance = content["provenance"]
    if provenance.get("source") is None:
        return None
    values = [content["ablations"], content["prompts"], *(provenance.get(key) for key in IDENTITY)]
    return json.loads(json.dumps(values))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the content of sweep.json if this program wrote it, else None. Raises OSError."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        parts = [content[name] for name in ("ablations", "prompts", "provenance", "files")]
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError):
        return None
    return content if list(map(type, parts)) == [list, list, dict, dict] else None


def _replaceable_files(
    out: Path, names: Iterable[str], overwrite: bool, is_same: Callable[[Mapping[str, Any]], bool]
) -> list[str]:
    """Return the names of the files of the earlier result in `out`, sweep.json first; none if it holds no result.

    names: the files of the new result. is_same: whether the result with this sweep.json may be replaced without
    `overwrite`. Raises InvalidOutput if the new result would replace a result that differs, or a file that is not ours.
    """
    own, manifest = list[str](), read_manifest(out)
    if manifest is not None:
        files = {name: out / name for name in manifest["files"] if Path(name).name == name}
        unchanged = [name for name, path in files.items() if path.is_file() and sha256(path) == manifest["files"][name]]
        own = [MANIFEST, *unchanged]
    if foreign := [name for name in names if name not in own and _exists(out / name)]:
        raise InvalidOutput(
            f"cannot write to {out}: its {foreign[0]} is not, or no longer, the file that this program wrote there; "
            "move it away, or choose another folder"
        )
    if manifest is not None and not overwrite and not is_same(manifest):
        raise InvalidOutput(
            f"{out} holds the result of another question, model, study, imputation or dtype, or does not say of which: "
            "choose another folder, or replace it with --overwrite (in Python, overwrite=True)"
        )
    return own


def _replace(draft: Path, out: Path, earlier: Iterable[str]) -> None:
    """Put the files of `draft` in the place of the earlier ones; after any exception, `out` is as before."""
    old = draft.with_name("old")
    old.mkdir()
    # sweep.json goes first and comes last: if the process is killed in between, no result is there.
    moves = [(out / name, old / name) for name in earlier]
    new = sorted(draft.iterdir(), key=lambda path: path.name == MANIFEST)
    moves += [(path, out / path.name) for path in new]
    done = []
    try:
        for source, target in moves:
            source.rename(target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        raise


def _exists(path: Path) -> bool:
    """Whether there is anything at a path, also a link that leads nowhere. Raises OSError if this cannot be known."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock that other processes of this program respect; the system drops it if the process is killed."""
    descriptor = None
    with suppress(ImportError, OSError):  # neither Windows nor every network drive has such locks
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
