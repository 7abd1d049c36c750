"""Computes every number of a report: cells, aggregates, comparisons, profiles.

Human-normalised scores are fractions here (1 is human); only words print percent.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aps_jax.report import finished_runs
from aps_jax.scores import estimates, protocol, scores

# The systems beside which the APS talk puts its own.
DEFAULT_SYSTEMS = ("SimPLe", "DER", "CURL", "DrQ", "SPR", "VISR", "APT", "APS")

PRETRAINED, SCRATCH = "pretrained", "scratch"
_NUM_THRESHOLDS = 121
# Printed to 0.1 percent, from cells that were rounded to 0.1 points themselves.
_ROUNDING = 0.001
# Reward weights name the agent; comparing agents is what a comparison is for.
_AGENT_OPTIONS = frozenset({"skill_weight", "entropy_weight"})


class Method(NamedTuple):
    """Runs that differ in game and seed alone, and may therefore be averaged."""

    label: str
    agent: str
    arm: str
    settings: Mapping[str, Any]
    runs: Mapping[str, tuple[finished_runs.Run, ...]]  # Game -> a run for each seed.


class Cell(NamedTuple):
    """What one method scored in one game."""

    score: estimates.Estimate  # Points; the mean over seeds of each seed's mean.
    normalized: estimates.Estimate | None  # Human-normalised; None without a table.
    num_seeds: int
    interval_over: str  # "seeds", "games" (of one trained agent), or "nothing".


class GameRow(NamedTuple):
    """One game: the yardsticks, the methods, and the published systems."""

    game: str
    random: float | None
    human: float | None
    cells: Mapping[str, Cell]  # By method label, where the method played the game.
    published: Mapping[str, scores.PublishedCell]  # By system.


class Summary(NamedTuple):
    """Aggregates of human-normalised scores over games."""

    num_games: int
    mean: estimates.Estimate
    median: estimates.Estimate
    interquartile_mean: estimates.Estimate
    optimality_gap: estimates.Estimate
    superhuman: estimates.Estimate  # Games at or above human.


class GameGain(NamedTuple):
    """What one method gains over another in one game."""

    game: str
    gain: estimates.Estimate  # Points.
    probability: estimates.Estimate  # That a run of the one beats a run of the other.


class Comparison(NamedTuple):
    """What one method gains over another on the games that both played."""

    label: str
    baseline: str
    num_games: int  # Games behind the aggregates: those with a normalised score.
    probability: estimates.Estimate | None
    mean_gain: estimates.Estimate | None  # Human-normalised.
    interquartile_mean_gain: estimates.Estimate | None  # Human-normalised.
    games: tuple[GameGain, ...]


class Profiles(NamedTuple):
    """Share of runs above each human-normalised score."""

    thresholds: np.ndarray  # [T]
    methods: Mapping[str, estimates.Estimate]  # [T] each, a run counts once.
    published: Mapping[str, np.ndarray]  # [T] each, a game's mean counts once.


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that the tables, files and pictures show."""

    methods: tuple[Method, ...]
    games: tuple[GameRow, ...]
    summaries: Mapping[str, Summary]  # By method label.
    published: Mapping[str, Summary]  # By system, on this report's games.
    published_all: Mapping[str, Summary]  # By system, on all 26 games.
    comparisons: tuple[Comparison, ...]
    profiles: Profiles
    notices: tuple[str, ...]
    num_resamples: int
    seed: int


def named_systems(systems: Sequence[str]) -> tuple[str, ...]:
    """Returns the published systems of these names, `all` standing for every one.

    Raises:
      ValueError: There is no such system; the message names those there are.
    """
    known = scores.published_scores()
    if list(systems) == ["all"]:
        return tuple(known)
    for system in systems:
        if system not in known:
            raise ValueError(
                f"No published system {system!r}; there are {', '.join(known)}."
            )
    return tuple(dict.fromkeys(systems))


def build(
    collection: finished_runs.Collection | None,
    *,
    systems: Sequence[str] = DEFAULT_SYSTEMS,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Report:
    """Computes a report from runs, or from the published scores alone.

    Args:
      collection: Runs and notices from `run_results.collect`; None for no runs.
      systems: Published systems to show beside the runs.
      num_resamples: Bootstrap resamples behind each interval.
      seed: Root of the resampling.

    Returns:
      The report.
    """
    bootstrap = functools.partial(
        estimates.bootstrap, seed=seed, num_resamples=num_resamples
    )
    table = scores.published_scores()
    if collection is None:
        methods, notices = (), []
        games = scores.atari26_games()
    else:
        methods = _group(collection.runs)
        games = sorted({run.game for run in collection.runs})
        notices = list(collection.notices) + _method_notices(methods)
    rows = tuple(_game_row(game, methods, systems, bootstrap) for game in games)

    normalized = {method.label: normalized_scores(method) for method in methods}
    summaries = {
        label: _summary(list(by_game.values()), bootstrap)
        for label, by_game in normalized.items()
        if by_game
    }
    published_all = {system: _published_summary(table[system]) for system in systems}
    published = {
        system: _published_summary(
            {game: cell for game, cell in table[system].items() if game in games}
        )
        for system in systems
        if any(game in table[system] for game in games)
    }
    return Report(
        methods=methods,
        games=rows,
        summaries=summaries,
        published=published,
        published_all=published_all,
        comparisons=_comparisons(methods, bootstrap),
        profiles=_profiles(normalized, games, systems, bootstrap),
        notices=tuple(
            notices
            + _published_notices(rows, systems)
            + (_printed_notices(published_all) if collection is None else [])
        ),
        num_resamples=num_resamples,
        seed=seed,
    )


def protocol_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a method's settings that says how it was evaluated."""
    prefix = "protocol."
    return {
        name.removeprefix(prefix): value
        for name, value in settings.items()
        if name.startswith(prefix)
    }


def check_against_rliable(built: Report, rliable: estimates.Rliable) -> tuple[str, ...]:
    """Compares each method's aggregates with those of the rliable library.

    Args:
      built: The report.
      rliable: From `statistics.import_rliable`.

    Returns:
      A line for each method: the largest differences of estimates and intervals.
    """
    lines = []
    for method in built.methods:
        ours = built.summaries.get(method.label)
        try:
            theirs = estimates.estimates_of_rliable(
                rliable,
                list(normalized_scores(method).values()),
                seed=built.seed,
                num_resamples=min(built.num_resamples, 2_000),
            )
        except ValueError as error:
            lines.append(f"{method.label}: not compared with rliable: {error}")
            continue
        points, ends = [], []
        for name, estimate in theirs.items():
            mine = getattr(ours, name)
            points.append(abs(mine.value - estimate.value))
            ends += [abs(mine.low - estimate.low), abs(mine.high - estimate.high)]
        lines.append(
            f"{method.label}: rliable {rliable.version} agrees to "
            f"{100 * max(points):.1g} points of percent on mean, median, IQM and "
            f"optimality gap, and to {100 * max(ends):.1g} on the ends of their "
            "intervals (its own resamples)."
        )
    return tuple(lines)


def _group(runs: Sequence[finished_runs.Run]) -> tuple[Method, ...]:
    """Groups runs into methods, and names each by what sets it apart."""
    groups: dict[tuple, list[finished_runs.Run]] = {}
    for run in runs:
        key = (run.agent, run.arm, json.dumps(run.settings, sort_keys=True))
        groups.setdefault(key, []).append(run)

    def rank(key: tuple) -> tuple:
        arms = (PRETRAINED, SCRATCH)
        agents = ("aps", "visr", "apt")
        agent, arm, settings = key
        return (
            agents.index(agent) if agent in agents else len(agents),
            agent,
            arms.index(arm) if arm in arms else len(arms),
            arm,
            str(groups[key][0].settings.get("preset")),
            settings,
        )

    methods = []
    for key in sorted(groups, key=rank):
        agent, arm, _ = key
        twins = [
            group[0].settings
            for (agent_, arm_, _), group in groups.items()
            if (agent_, arm_) == (agent, arm)
        ]
        settings = groups[key][0].settings
        differing = [
            f"{name.removeprefix('protocol.')}={_setting_words(settings, name)}"
            for name in _telling_differences(twins)
        ]
        label = agent if arm == PRETRAINED else f"{agent} {arm}"
        if differing:
            label += f" ({', '.join(differing)})"
        by_game: dict[str, list[finished_runs.Run]] = {}
        for run in sorted(groups[key], key=lambda run: (run.game, run.seed)):
            by_game.setdefault(run.game, []).append(run)
        methods.append(
            Method(
                label,
                agent,
                arm,
                settings,
                {game: tuple(seeds) for game, seeds in by_game.items()},
            )
        )
    return tuple(methods)


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names whose value is not the same in all settings."""
    names = sorted(set(itertools.chain.from_iterable(settings)))
    return [
        name
        for name in names
        if len({_setting_words(one, name) for one in settings}) > 1
    ]


def _setting_words(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "unknown"
    value = settings[name]
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _telling_differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names that differ, less those that a preset's name already tells."""
    by_preset: dict[Any, list[Mapping[str, Any]]] = {}
    for one in settings:
        by_preset.setdefault(one.get("preset"), []).append(one)
    within = {name for group in by_preset.values() for name in _differing(group)}
    return [
        name
        for name in _differing(settings)
        if name == "preset" or name.startswith("protocol.") or name in within
    ]


def _method_notices(methods: Sequence[Method]) -> list[str]:
    """Says where methods do not compare like with like."""
    notices = []
    for name in _telling_differences([method.settings for method in methods]):
        having = [method for method in methods if name in method.settings]
        values: dict[str, list[str]] = {}
        for method in having:
            words = _setting_words(method.settings, name)
            values.setdefault(words, []).append(method.label)
        if len(values) < 2 or name in _AGENT_OPTIONS:
            continue
        each = "; ".join(f"{value} in {', '.join(ms)}" for value, ms in values.items())
        what = "Mixed protocols" if name.startswith("protocol.") else "Mixed settings"
        notices.append(
            f"{what}: {name.removeprefix('protocol.')} is {each}. They are never "
            "averaged together; compare them with care."
        )
    told: dict[str, list[str]] = {}
    for method in methods:
        for complaint in _method_complaints(method):
            told.setdefault(complaint, []).append(method.label)
    notices += [f"{', '.join(labels)}: {text}" for text, labels in told.items()]
    if len({frozenset(method.runs) for method in methods}) > 1:
        counts = ", ".join(f"{len(method.runs)} ({method.label})" for method in methods)
        notices.append(
            f"Methods played different games, {counts}: aggregates are over each one's "
            "own games, comparisons over the games that both played."
        )
    return notices


def _method_complaints(method: Method) -> list[str]:
    """Says what a reader of one method's numbers must know."""
    complaints = []
    if odd := protocol.differences(protocol_of(method.settings)):
        complaints.append(f"not the standard protocol: {', '.join(odd)}.")
    counts = sorted({len(runs) for runs in method.runs.values()})
    if counts[0] < 2:
        complaints.append("single seeds, so aggregates have no interval.")
    elif counts[0] < 5:
        complaints.append(
            f"with {counts[0]} seeds, 95 % intervals are too narrow (docs/protocol.md)."
        )
    if len(counts) > 1:
        complaints.append(
            f"{counts[0]} to {counts[-1]} seeds per game; the IQM pools runs, so games "
            "with more seeds weigh more in it."
        )
    missing = [g for g in method.runs if scores.find_reference_scores(g) is None]
    if missing:
        complaints.append(
            f"no random and human scores for {', '.join(missing)}; not in the "
            "aggregates."
        )
    return complaints


def _published_notices(rows: Sequence[GameRow], systems: Sequence[str]) -> list[str]:
    """Names the published cells that cannot be right."""
    return [
        f"{system}, {scores.camel_case(row.game)}: {cell.score:g}, as printed, is "
        f"suspect ({cell.suspect})."
        for system in systems
        for row in rows
        if (cell := row.published.get(system)) is not None and cell.suspect
    ]


def _printed_notices(published_all: Mapping[str, Summary]) -> list[str]:
    """Says where a printed summary is not what the printed cells give."""
    notices = []
    for system, printed in scores.printed_summaries().items():
        if system not in published_all:
            continue
        summary = published_all[system]
        told = [
            f"{name} {100.0 * stated:.6g} (cells: {100.0 * computed:.1f})"
            for name, stated, computed in (
                ("mean", printed.mean, float(summary.mean.value)),
                ("median", printed.median, float(summary.median.value)),
            )
            if stated is not None and abs(stated - computed) > _ROUNDING
        ]
        count = int(summary.superhuman.value)
        if printed.superhuman is not None and printed.superhuman != count:
            told.append(
                f"{printed.superhuman} games at or above human (cells: {count})"
            )
        if told:
            notices.append(f"{system}: its table prints {', '.join(told)}.")
    return notices


def _seed_means(runs: Sequence[finished_runs.Run]) -> np.ndarray:
    return np.array([run.returns.mean() for run in runs])


def normalized_scores(method: Method) -> dict[str, np.ndarray]:
    """Returns the human-normalised scores `[R]` of each game that has a reference."""
    return {
        game: scores.human_normalized_score(game, _seed_means(runs))
        for game, runs in method.runs.items()
        if scores.find_reference_scores(game) is not None
    }


def _game_row(
    game: str, methods: Sequence[Method], systems: Sequence[str], bootstrap: Any
) -> GameRow:
    reference = scores.find_reference_scores(game)
    cells = {
        method.label: _cell(game, method.runs[game], bootstrap)
        for method in methods
        if game in method.runs
    }
    table = scores.published_scores()
    published = {
        system: table[system][game] for system in systems if game in table[system]
    }
    random, human = reference if reference is not None else (None, None)
    return GameRow(game, random, human, cells, published)


def _cell(game: str, runs: Sequence[finished_runs.Run], bootstrap: Any) -> Cell:
    if len(runs) > 1:
        score, over = bootstrap(estimates.mean, [_seed_means(runs)]), "seeds"
    elif runs[0].returns.size > 1:
        score, over = bootstrap(estimates.mean, [runs[0].returns]), "games"
    else:
        score, over = bootstrap(estimates.mean, [runs[0].returns]), "nothing"
    normalized = None
    if scores.find_reference_scores(game) is not None:
        normalized = estimates.Estimate(
            *(scores.human_normalized_score(game, value) for value in score)
        )
    return Cell(score, normalized, len(runs), over)


def _summary(groups: Sequence[np.ndarray], bootstrap: Any) -> Summary:
    return Summary(
        len(groups),
        bootstrap(estimates.mean, groups),
        bootstrap(estimates.median, groups),
        bootstrap(estimates.interquartile_mean, groups),
        bootstrap(estimates.optimality_gap, groups),
        bootstrap(estimates.superhuman_count, groups),
    )


def _published_summary(cells: Mapping[str, scores.PublishedCell]) -> Summary:
    """Summarises published means; a mean per game leaves nothing to resample."""
    groups = [
        np.array([scores.human_normalized_score(game, cell.score)])
        for game, cell in cells.items()
    ]
    return _summary(
        groups, functools.partial(estimates.bootstrap, seed=0, num_resamples=1)
    )


def _comparisons(methods: Sequence[Method], bootstrap: Any) -> tuple[Comparison, ...]:
    """Compares pretrained methods with scratch, then with each other.

    Scratch must share every setting but pretraining's; pretrained methods must share
    the protocol, and their labels tell the rest.
    """

    def agree(first: Method, second: Method, *, prefix: str) -> bool:
        shared = (first.settings.keys() & second.settings.keys()) - _AGENT_OPTIONS
        return all(
            first.settings[name] == second.settings[name]
            for name in shared
            if name.startswith(prefix)
        )

    pretrained = [method for method in methods if method.arm == PRETRAINED]
    scratch = [method for method in methods if method.arm == SCRATCH]
    pairs = [
        (method, baseline)
        for method in pretrained
        for baseline in scratch
        if method.agent == baseline.agent and agree(method, baseline, prefix="")
    ]
    pairs += [
        pair
        for pair in itertools.combinations(pretrained, 2)
        if agree(*pair, prefix="protocol.")
    ]
    return tuple(
        _compare(method, baseline, bootstrap)
        for method, baseline in pairs
        if method.runs.keys() & baseline.runs.keys()
    )


def _compare(method: Method, baseline: Method, bootstrap: Any) -> Comparison:
    def difference(statistic: Any) -> Any:
        return lambda ours, theirs: statistic(ours) - statistic(theirs)

    gains = []
    for game in sorted(method.runs.keys() & baseline.runs.keys()):
        groups = [
            [_seed_means(method.runs[game])],
            [_seed_means(baseline.runs[game])],
        ]
        gains.append(
            GameGain(
                game,
                bootstrap(difference(estimates.mean), *groups),
                bootstrap(estimates.probability_of_improvement, *groups),
            )
        )
    ours, theirs = normalized_scores(method), normalized_scores(baseline)
    shared = sorted(ours.keys() & theirs.keys())
    groups = [[side[game] for game in shared] for side in (ours, theirs)]
    aggregates: list[estimates.Estimate | None] = [None, None, None]
    if shared:
        aggregates = [
            bootstrap(estimates.probability_of_improvement, *groups),
            bootstrap(difference(estimates.mean), *groups),
            bootstrap(difference(estimates.interquartile_mean), *groups),
        ]
    return Comparison(
        method.label, baseline.label, len(shared), *aggregates, games=tuple(gains)
    )


def _profiles(
    normalized: Mapping[str, Mapping[str, np.ndarray]],
    games: Sequence[str],
    systems: Sequence[str],
    bootstrap: Any,
) -> Profiles:
    """Computes profiles on thresholds that show both the runs and human level."""
    table = scores.published_scores()
    published = {
        system: [
            np.array([scores.human_normalized_score(game, table[system][game].score)])
            for game in games
            if game in table[system]
        ]
        for system in systems
    }
    published = {system: groups for system, groups in published.items() if groups}
    methods = {
        label: list(by_game.values())
        for label, by_game in normalized.items()
        if by_game
    }
    every = [game for groups in methods.values() for game in groups]
    pooled = np.concatenate(every) if every else np.array([0.0])
    low = min(0.0, float(pooled.min()))
    high = min(max(1.5, 1.1 * float(pooled.max())), 4.0)
    thresholds = np.linspace(low, high, _NUM_THRESHOLDS)
    profile = functools.partial(estimates.performance_profile, thresholds=thresholds)
    return Profiles(
        thresholds,
        {label: bootstrap(profile, groups) for label, groups in methods.items()},
        {system: profile(groups) for system, groups in published.items()},
    )
