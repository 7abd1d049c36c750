"""Computes every number of a report: cells, aggregates, comparisons.

Human-normalised scores are fractions here (1 is human); only tables print percent.
"""

import collections
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aps_jax.report import finished_runs
from aps_jax.report.finished_runs import PRETRAINED, SCRATCH, FinishedRun
from aps_jax.scores import estimates, protocol, scores

# The systems beside which the APS talk puts its own.
DEFAULT_SYSTEMS = ("SimPLe", "DER", "CURL", "DrQ", "SPR", "VISR", "APT", "APS")

_Bootstrap = Callable[..., estimates.Estimate]


class Method(NamedTuple):
    """Runs that differ in game and seed alone, and may therefore be averaged."""

    label: str
    agent: str
    arm: str
    settings: Mapping[str, Any]
    runs: Mapping[str, tuple[FinishedRun, ...]]  # Game -> a run for each seed.

    @property
    def protocol(self) -> dict[str, Any]:
        """How its games were played."""
        return finished_runs.protocol_of(self.settings)

    @property
    def is_comparable(self) -> bool:
        """Whether its scores may be human-normalised."""
        return protocol.is_comparable(self.protocol)


class Cell(NamedTuple):
    """What one method scored in one game."""

    score: estimates.Estimate  # Points; the mean over seeds of each seed's mean.
    normalized: estimates.Estimate | None  # Human-normalised, if comparable.
    num_seeds: int  # One has no interval.


class GameRow(NamedTuple):
    """One game: the yardsticks, the methods, and the published systems."""

    game: str
    random: float | None
    human: float | None
    cells: Mapping[str, Cell]  # By method label, where the method played the game.
    published: Mapping[str, scores.PublishedCell]  # By system.


class Summary(NamedTuple):
    """Aggregates of human-normalised scores over games, by estimator."""

    num_games: int
    mean: estimates.Estimate
    median: estimates.Estimate
    interquartile_mean: estimates.Estimate
    optimality_gap: estimates.Estimate
    superhuman_count: estimates.Estimate  # Games at or above human.


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


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that the tables, files and pictures show."""

    methods: tuple[Method, ...]
    games: tuple[GameRow, ...]
    summaries: Mapping[str, Summary]  # By method label.
    published: Mapping[str, Summary]  # By system, on this report's games.
    comparisons: tuple[Comparison, ...]
    notices: tuple[str, ...]


def named_systems(systems: Sequence[str]) -> tuple[str, ...]:
    """Returns the published systems of these names, `all` standing for every one.

    Raises:
      ValueError: There is no such system; the message names those there are.
    """
    known = scores.published_scores()
    if list(systems) == ["all"]:
        return tuple(known)
    for one in (system for system in systems if system not in known):
        raise ValueError(f"No published system {one!r}; there are {', '.join(known)}.")
    return tuple(dict.fromkeys(systems))


def build(
    collection: finished_runs.Collection | None,
    *,
    systems: Sequence[str],
    num_resamples: int,
) -> Report:
    """Computes a report from collected runs, or from the published scores alone."""
    bootstrap = functools.partial(
        estimates.bootstrap, seed=0, num_resamples=num_resamples
    )
    methods: tuple[Method, ...] = ()
    games: Sequence[str] = scores.atari26_games()
    notices: list[str] = []
    if collection is not None:
        methods = _group(collection.runs)
        games = sorted({run.game for run in collection.runs})
        notices = [*collection.notices, *_method_notices(methods)]
    normalized = {method.label: normalized_scores(method) for method in methods}
    normalized = {label: by_game for label, by_game in normalized.items() if by_game}
    if methods and not normalized:
        systems = ()  # They would stand beside scores of other games.
    table = scores.published_scores()
    published = {one: _normalized_means(table[one], games) for one in systems}
    published = {system: groups for system, groups in published.items() if groups}
    rows = tuple(_game_row(game, methods, systems, bootstrap) for game in games)
    notices += [
        f"{system}, {scores.camel_case(row.game)}: {cell.score:g}, as printed, is "
        f"suspect ({cell.suspect})."
        for system in systems
        for row in rows
        if (cell := row.published.get(system)) is not None and cell.suspect
    ]

    def summaries(groups: Mapping[str, estimates.Scores]) -> dict[str, Summary]:
        return {name: _summary(group, bootstrap) for name, group in groups.items()}

    ours = {label: list(by_game.values()) for label, by_game in normalized.items()}
    return Report(
        methods,
        rows,
        summaries(ours),
        summaries(published),
        _comparisons(methods, bootstrap),
        tuple(notices),
    )


def normalized_scores(method: Method) -> dict[str, np.ndarray]:
    """Returns the human-normalised scores `[R]` of each game that has any."""
    return {
        game: scores.human_normalized_score(game, _seed_means(runs))
        for game, runs in method.runs.items()
        if method.is_comparable and scores.find_reference_scores(game) is not None
    }


def _group(runs: Sequence[FinishedRun]) -> tuple[Method, ...]:
    """Groups runs into methods, and names each by what sets it apart."""
    groups: dict[tuple[Any, ...], list[FinishedRun]] = collections.defaultdict(list)
    for run in runs:
        rank = (PRETRAINED, SCRATCH, run.arm).index(run.arm)
        preset = str(run.settings.get("preset"))
        settings = json.dumps(run.settings, sort_keys=True)
        groups[run.agent, rank, run.arm, preset, settings].append(run)
    methods = []
    for key in sorted(groups):
        first = groups[key][0]
        label = first.agent if first.arm == PRETRAINED else f"{first.agent} {first.arm}"
        twins = [group[0] for twin, group in groups.items() if twin[:3] == key[:3]]
        if differing := _telling_differences(twins):
            label += f" ({', '.join(_format_setting(first, n) for n in differing)})"
        by_game: dict[str, list[FinishedRun]] = collections.defaultdict(list)
        for run in sorted(groups[key], key=lambda run: (run.game, run.seed)):
            by_game[run.game].append(run)
        seeds = {game: tuple(played) for game, played in by_game.items()}
        methods.append(Method(label, first.agent, first.arm, first.settings, seeds))
    return tuple(methods)


def _format_setting(run: Method | FinishedRun, name: str) -> str:
    """Returns `name=value` as labels show it."""
    value = run.settings.get(name, "unknown")
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return f"{name.removeprefix('protocol.')}={text}"


def _preset(run: Method | FinishedRun) -> Any:
    return run.settings.get("preset")


def _telling_differences(runs: Sequence[Method | FinishedRun]) -> list[str]:
    """Returns the settings that differ, less those that come with preset or agent.

    Of one preset the budgets should be the same, and of one agent the options too.
    """

    def is_telling(name: str) -> bool:
        if name == "preset" or name.startswith("protocol."):
            return _differs(runs, name)
        if name in finished_runs.BUDGETS:
            return _differs(runs, name, _preset)
        return _differs(runs, name, lambda run: (_preset(run), run.agent))

    return sorted(filter(is_telling, {name for run in runs for name in run.settings}))


def _differs(
    runs: Sequence[Method | FinishedRun],
    name: str,
    key: Callable[[Method | FinishedRun], Any] = lambda run: None,
) -> bool:
    """Tells whether a setting differs among runs of the same key."""
    pairs = {(key(run), _format_setting(run, name)) for run in runs}
    return len(pairs) > len({first for first, _ in pairs})


def _method_notices(methods: Sequence[Method]) -> list[str]:
    """Says where methods do not compare like with like."""
    notices = []
    for name in _telling_differences(methods):
        values: dict[str, list[str]] = collections.defaultdict(list)
        for method in (one for one in methods if name in one.settings):
            setting, _, value = _format_setting(method, name).partition("=")
            values[value].append(method.label)
        if len(values) == 1:  # Scratch has no values of pretraining.
            continue
        each = "; ".join(f"{v} in {', '.join(ms)}" for v, ms in values.items())
        kind = "protocols" if name.startswith("protocol.") else "settings"
        notices.append(
            f"Mixed {kind}: {setting} is {each}. They are never averaged together; "
            "compare them with care."
        )
    labels_of: dict[str, list[str]] = collections.defaultdict(list)
    for method in methods:
        for remark in _method_remarks(method):
            labels_of[remark].append(method.label)
    notices += [f"{', '.join(labels)}: {text}" for text, labels in labels_of.items()]
    if len({frozenset(method.runs) for method in methods}) > 1:
        counts = ", ".join(f"{len(method.runs)} ({method.label})" for method in methods)
        notices.append(
            f"Methods played different games, {counts}: aggregates are over each one's "
            "own games, comparisons over the games that both played."
        )
    return notices


def _method_remarks(method: Method) -> list[str]:
    """Says what a reader of one method's numbers must know."""
    odd = ", ".join(protocol.differences(method.protocol))
    missing = [g for g in method.runs if scores.find_reference_scores(g) is None]
    counts = [len(runs) for runs in method.runs.values()]
    fewest, most = min(counts), max(counts)
    remarks = {
        f"not the standard protocol: {odd}.": odd,
        "under this protocol the game is another one than that of the random, human "
        "and published scores: no human-normalised score.": not method.is_comparable,
        "single seeds have no interval.": fewest == 1,
        f"with {fewest} seeds, 95 % intervals are too narrow (docs/protocol.md).": (
            1 < fewest < 5
        ),
        f"{fewest} to {most} seeds per game; the IQM pools runs, so games with more "
        "seeds weigh more in it.": fewest < most,
        f"no random and human scores for {', '.join(missing)}; not in the "
        "aggregates.": missing,
    }
    return [remark for remark, is_true in remarks.items() if is_true]


def _seed_means(runs: Sequence[FinishedRun]) -> np.ndarray:
    return np.array([run.returns.mean() for run in runs])


def _normalized_means(
    cells: Mapping[str, scores.PublishedCell], games: Iterable[str]
) -> list[np.ndarray]:
    """Returns a published system's scores `[1]` of the games that it played."""
    return [
        np.array([scores.human_normalized_score(game, cells[game].score)])
        for game in games
        if game in cells
    ]


def _game_row(
    game: str, methods: Sequence[Method], systems: Sequence[str], bootstrap: _Bootstrap
) -> GameRow:
    random, human = scores.find_reference_scores(game) or (None, None)
    cells = {m.label: _cell(game, m, bootstrap) for m in methods if game in m.runs}
    table = scores.published_scores()
    published = {one: table[one][game] for one in systems if game in table[one]}
    return GameRow(game, random, human, cells, published)


def _cell(game: str, method: Method, bootstrap: _Bootstrap) -> Cell:
    runs = method.runs[game]
    score = bootstrap(estimates.mean, [_seed_means(runs)])
    normalized = None
    if game in normalized_scores(method):
        ends = (scores.human_normalized_score(game, value) for value in score)
        normalized = estimates.Estimate(*ends)
    return Cell(score, normalized, len(runs))


def _summary(groups: estimates.Scores, bootstrap: _Bootstrap) -> Summary:
    statistics = (getattr(estimates, name) for name in Summary._fields[1:])
    return Summary(len(groups), *(bootstrap(one, groups) for one in statistics))


def _comparisons(
    methods: Sequence[Method], bootstrap: _Bootstrap
) -> tuple[Comparison, ...]:
    """Compares pretrained methods with scratch, then with each other."""
    pretrained = [method for method in methods if method.arm == PRETRAINED]
    # Scratch must share every setting but pretraining's, all must share the protocol.
    pairs = [
        (method, baseline)
        for method, baseline in itertools.product(pretrained, methods)
        if baseline.arm == SCRATCH
        and method.agent == baseline.agent
        and all(
            value == baseline.settings.get(name, value)
            for name, value in method.settings.items()
        )
    ]
    pairs += itertools.combinations(pretrained, 2)
    return tuple(
        _compare(method, baseline, bootstrap)
        for method, baseline in pairs
        if method.protocol == baseline.protocol
        and method.runs.keys() & baseline.runs.keys()
    )


def _compare(method: Method, baseline: Method, bootstrap: _Bootstrap) -> Comparison:
    def gain(statistic: Callable[..., Any], *groups: Any) -> estimates.Estimate:
        return bootstrap(lambda x, y: statistic(x) - statistic(y), *groups)

    improvement = estimates.probability_of_improvement
    games = []
    for game in sorted(method.runs.keys() & baseline.runs.keys()):
        two = [[_seed_means(one.runs[game])] for one in (method, baseline)]
        both = gain(estimates.mean, *two), bootstrap(improvement, *two)
        games.append(GameGain(game, *both))
    ours, theirs = normalized_scores(method), normalized_scores(baseline)
    shared = sorted(ours.keys() & theirs.keys())
    two = [[side[game] for game in shared] for side in (ours, theirs)]
    return Comparison(
        method.label,
        baseline.label,
        len(shared),
        bootstrap(improvement, *two) if shared else None,
        gain(estimates.mean, *two) if shared else None,
        gain(estimates.interquartile_mean, *two) if shared else None,
        tuple(games),
    )
