"""The summary of a run: one cause that many failures share, how many requirements hold, and the others by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ablation.checks.cases import Case, with_factor
from ablation.checks.check import LIKELY_CAUSE, Check, adapter_name, offered_imputations, unsupported_features
from ablation.checks.decoders import ALL_FAMILIES, DTYPES, GROUPED
from ablation.checks.protocol import IMPUTATIONS, Factory
from ablation.checks.runner import CHECKS, Record, run_check, tries_nothing

LABELS = {
    "failed": "broken",
    "expected failure": "known to be broken",
    "unexpected pass": "no longer broken, so remove it from the expected failures",
    "skipped": "not tried",
}
MANY = 8
"""From this number on, checks that were skipped for one reason are counted, not named."""


def verdict(factory: Factory, records: Sequence[Record], total: int = len(CHECKS)) -> list[str]:
    """Return the lines of the summary. Failing checks run again, quickly, to find a cause that they share.

    total: the number of checks that could be run.
    """
    return [*shared_cause(factory, records), *outcomes(records, total)] if records else []


def outcomes(records: Sequence[Record], total: int) -> list[str]:
    """Return how many requirements hold, and a line for each of the others."""
    return [how_many_hold(records, total), *(line for outcome in LABELS for line in _lines(outcome, records))]


def how_many_hold(records: Sequence[Record], total: int) -> str:
    """Return how many requirements hold, and how many checks were not run."""
    rest = f"; {total - len(records)} were not run" if len(records) < total else ""
    return f"{held(records)} of {len(records)} requirements hold{rest}"


def held(records: Sequence[Record]) -> int:
    """Return the number of requirements that hold."""
    return sum(record.outcome in ("passed", "unexpected pass") for record in records)


def _lines(outcome: str, records: Sequence[Record]) -> Iterator[str]:
    """Yield a line for each check with this outcome; one for all checks that were skipped for the same reason."""
    found = [record for record in records if record.outcome == outcome]
    if outcome == "failed":
        should = {check.id for check in CHECKS if check.level == "SHOULD"}
        yield from (f"{LABELS[outcome]}: {record.id}{' (should)' * (record.id in should)}" for record in found)
        return
    for reason in dict.fromkeys(record.reason for record in found):
        ids = [record.id for record in found if record.reason == reason]
        yield f"{LABELS[outcome]}: {', '.join(ids) if len(ids) < MANY else f'{len(ids)} checks'} ({reason})"


def shared_cause(factory: Factory, records: Sequence[Record]) -> list[str]:
    """Say what several failures have in common: a likely cause, and features that could be declared as unsupported.

    A feature that at least two failing cases need is a cause if most of them pass when that feature alone is exchanged.
    A failure goes away if the check then passes, or cannot be tried, when it runs again without the feature.
    """
    failed = [record for record in records if record.outcome == "failed"]
    left = {record.id: record.case for record in failed if record.case is not None}
    total, declared = len(left), dict[str, str]()
    while found := _best_feature(factory, declared, left):
        feature, left = found
        declared[feature] = "..."
    lines = [
        f"{count} of the {len(failed)} failures have one likely cause: {cause}"
        for cause, count in Counter(filter(None, map(_likely_cause, records))).most_common(1)
        if count > 1
    ]
    if declared:
        names = ", ".join(f"{feature!r}: ..." for feature in declared)
        lines.append(f"if you declare unsupported = {{{names}}}, {total - len(left)} of the {total} failures go away")
    return lines


def _likely_cause(record: Record) -> str | None:
    """Return the likely cause that the message of a failure names."""
    _, found, rest = record.reason.partition(f"\n{LIKELY_CAUSE}")
    return rest.partition("\n")[0] if found and record.outcome == "failed" else None


def _best_feature(
    factory: Factory, declared: dict[str, str], left: dict[str, Case]
) -> tuple[str, dict[str, Case]] | None:
    """Return the feature without which most failures go away, at least two, and the failures that are then left."""
    checks = {check: left[check.id] for check in CHECKS if check.id in left}
    needed = {check: _features(case) for check, case in checks.items()}
    if any("cache" in check.needs for check in checks):  # `identity` decodes with a cache, too
        needed = {check: [*features, "cache"] for check, features in needed.items()}
    best, most = None, 1
    for feature, count in Counter(feature for features in needed.values() for feature in features).items():
        restricted = _without(factory, {**declared, feature: "..."})
        users = {check: case for check, case in checks.items() if feature in needed[check]}
        if count <= most or tries_nothing(restricted) or not _is_cause(feature, restricted, users):
            continue
        gone = {check.id for check in users if run_check(check, restricted, quick=True).outcome != "failed"}
        if len(gone) > most:
            best, most = (feature, {id: case for id, case in left.items() if id not in gone}), len(gone)
    return best


def _is_cause(feature: str, restricted: Factory, failing: Mapping[Check, Case]) -> bool:
    """Return whether most failing cases pass when a feature is exchanged. restricted: the adapter without it."""
    pass_, fail = 0, 0
    for check, case in failing.items():
        if feature == "cache" and "cache" in check.needs:
            continue  # nothing could replace it
        if check.passes(restricted, _exchanged(case, feature, restricted)):
            pass_ += 1
        else:
            fail += 1
        if 2 * fail >= len(failing):
            return False
    return pass_ > fail


def _features(case: Case) -> list[str]:
    """Return the features that a case needs and that may be exchanged, the narrowest first."""
    return [
        case.decoder.family,
        case.decoder.dtype,
        *([case.kind] if case.heads and case.kind in IMPUTATIONS else []),
        *(["positions"] if case.positions is not None else []),
        *(["padding"] if case.is_padded else []),
        *(["multiple_heads"] if len(case.heads) > 1 else []),
        *(["batch"] if len(case.rows) > 1 else []),
    ]


def _exchanged(case: Case, feature: str, restricted: Factory) -> Case:
    """Return a case without a feature, in which nothing else differs; the same case if nothing can replace it."""
    if feature in ALL_FAMILIES or feature in DTYPES:
        return next(_other_decoders(case, feature, unsupported_features(restricted)), case)
    if feature in IMPUTATIONS:
        return replace(case, imputation=with_factor(offered_imputations(restricted)[0]), by_position=False)
    match feature:
        case "positions":
            return replace(case, positions=None)
        case "padding":
            shortest = min(map(len, case.rows))
            return replace(case, rows=tuple(row[:shortest] for row in case.rows))
        case "multiple_heads":
            return replace(case, heads=case.heads[:1])
        case "batch":
            return replace(case, rows=case.rows[:1])
    return case


def _other_decoders(case: Case, feature: str, unsupported: Iterable[str]) -> Iterator[Case]:
    """Yield a case with each other family, or with each other dtype, that has its heads."""
    decoder = case.random_decoder
    for name in ALL_FAMILIES if feature in ALL_FAMILIES else DTYPES:
        if name in (feature, *unsupported):
            continue
        other = decoder._replace(dtype=name) if feature in DTYPES else decoder._replace(family=name)
        if other.family not in GROUPED:
            other = other._replace(num_key_value_groups=1)
        if set(case.heads) <= set(other.heads()) and (other.family, other.dtype) != ("mixtral", "float64"):
            yield replace(case, decoder=other)


def _without(factory: Factory, declared: dict[str, str]) -> Any:
    """Return the same adapter, with more features declared as unsupported."""
    restricted: Any = partial(factory)
    restricted.imputations = offered_imputations(factory)
    restricted.unsupported = {**unsupported_features(factory), **declared}
    restricted.__qualname__ = adapter_name(factory)
    return restricted
