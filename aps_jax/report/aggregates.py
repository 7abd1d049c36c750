"""Computes every number of a report: cells, aggregates, comparisons, profiles.

Human-normalised scores are fractions here (1 is human); only tables print percent.
"""

import collections
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aps_jax.report import finished_runs
from aps_jax.report.finished_runs import PRETRAINED, SCRATCH, FinishedRun
from aps_jax.scores import estimates, protocol, scores

# The systems beside which the APS talk puts its own.
DEFAULT_SYSTEMS = ("SimPLe", "DER", "CURL", "DrQ", "SPR", "VISR", "APT", "APS")

_NUM_THRESHOLDS = 121
# Printed to 0.1 percent, from cells that were rounded to 0.1 points themselves.
_ROUNDING = 0.001

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
      collection: Runs and notices from `finished_runs.collect`; None for no runs.
      systems: Published systems to show beside runs that are comparable with them.
      num_resamples: Bootstrap resamples behind each interval.
      seed: Root of the resampling.

    Returns:
      The report.
    """
    bootstrap = functools.partial(
        estimates.bootstrap, seed=seed, num_resamples=num_resamples
    )
    methods: tuple[Method, ...] = ()
    games: Sequence[str] = scores.atari26_games()
    notices: list[str] = []
    if collection is not None:
        methods = _group(collection.runs)
        games = sorted({run.game for run in collection.runs})
        notices = list(collection.notices) + _method_notices(methods)
    normalized = {
        method.label: by_game
        for method in methods
        if (by_game := normalized_scores(method))
    }
    if methods and not normalized:
        systems = ()
    table = scores.published_scores()
    published = {
        system: _normalized_means(table[system], games)
        for system in systems
        if any(game in table[system] for game in games)
    }
    published_all = {
        system: _summary(_normalized_means(table[system], table[system]), bootstrap)
        for system in systems
    }
    rows = tuple(_game_row(game, methods, systems, bootstrap) for game in games)
    notices += [
        f"{system}, {scores.camel_case(row.game)}: {cell.score:g}, as printed, is "
        f"suspect ({cell.suspect})."
        for system in systems
        for row in rows
        if (cell := row.published.get(system)) is not None and cell.suspect
    ]
    if collection is None:
        notices += _printed_notices(published_all)
    return Report(
        methods=methods,
        games=rows,
        summaries={
            label: _summary(list(by_game.values()), bootstrap)
            for label, by_game in normalized.items()
        },
        published={
            system: _summary(groups, bootstrap) for system, groups in published.items()
        },
        published_all=published_all,
        comparisons=_comparisons(methods, bootstrap),
        profiles=_profiles(normalized, published, bootstrap),
        notices=tuple(notices),
        num_resamples=num_resamples,
        seed=seed,
    )


def normalized_scores(method: Method) -> dict[str, np.ndarray]:
    """Returns the human-normalised scores `[R]` of each game for which there are any."""
    return {
        game: scores.human_normalized_score(game, _seed_means(runs))
        for game, runs in method.runs.items()
        if method.is_comparable and scores.find_reference_scores(game) is not None
    }


def check_against_rliable(built: Report, rliable: types.ModuleType) -> tuple[str, ...]:
    """Compares each method's aggregates with those of the rliable library.

    Args:
      built: The report.
      rliable: From `estimates.import_rliable`.

    Returns:
      A line for each method: the largest differences of estimates and intervals.
    """
    lines = []
    for method in built.methods:
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
        ours = [getattr(built.summaries[method.label], name) for name in theirs]
        value, low, high = np.abs(np.subtract(ours, list(theirs.values()))).max(axis=0)
        lines.append(
            f"{method.label}: rliable {importlib.metadata.version('rliable')} agrees to "
            f"{100 * value:.1g} points of percent on mean, median, IQM and optimality "
            f"gap, and to {100 * max(low, high):.1g} on the ends of their intervals (its "
            "own resamples)."
        )
    return tuple(lines)


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


def _telling_differences(runs: Sequence[Method | FinishedRun]) -> list[str]:
    """Returns the settings that differ, less those that come with preset or agent.

    Of one preset the budgets should be the same, and of one agent the options too.
    """

    def is_telling(name: str) -> bool:
        if name == "preset" or name.startswith("protocol."):
            return _differs(runs, name)
        if name in finished_runs.BUDGETS:
            return _differs(runs, name, lambda run: run.settings.get("preset"))
        return _differs(runs, name, lambda run: (run.settings.get("preset"), run.agent))

    return [name for name in _names(runs) if is_telling(name)]


def _differs(
    runs: Sequence[Method | FinishedRun],
    name: str,
    key: Callable[[Method | FinishedRun], Any] = lambda run: None,
) -> bool:
    """Tells whether a setting differs among runs of the same key."""
    pairs = {(key(run), _format_setting(run, name)) for run in runs}
    return len(pairs) > len({first for first, _ in pairs})


def _names(runs: Sequence[Method | FinishedRun]) -> list[str]:
    return sorted({name for run in runs for name in run.settings})


def _method_notices(methods: Sequence[Method]) -> list[str]:
    """Says where methods do not compare like with like."""
    notices, own = [], []
    telling = _telling_differences(methods)
    for name in _names(methods):
        having = [method for method in methods if name in method.settings]
        if name not in telling:
            if _differs(having, name, lambda method: method.settings.get("preset")):
                own.append(name)
        elif _differs(having, name):
            values: dict[str, list[str]] = collections.defaultdict(list)
            for method in having:
                value = _format_setting(method, name).partition("=")[2]
                values[value].append(method.label)
            each = "; ".join(
                f"{value} in {', '.join(m)}" for value, m in values.items()
            )
            kind = "protocols" if name.startswith("protocol.") else "settings"
            notices.append(
                f"Mixed {kind}: {name.removeprefix('protocol.')} is {each}. They are "
                "never averaged together; compare them with care."
            )
    if own:
        notices.append(f"Agents differ in these options too: {', '.join(own)}.")
    told: dict[str, list[str]] = collections.defaultdict(list)
    for method in methods:
        for complaint in _method_complaints(method):
            told[complaint].append(method.label)
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
    if odd := protocol.differences(method.protocol):
        complaints.append(f"not the standard protocol: {', '.join(odd)}.")
    if not method.is_comparable:
        complaints.append(
            "under this protocol the game is another one than that of the random, human "
            "and published scores; no human-normalised score and no aggregates."
        )
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


def _printed_notices(published_all: Mapping[str, Summary]) -> list[str]:
    """Says where a printed summary is not what the printed cells give."""
    notices = []
    for system, printed in scores.printed_summaries().items():
        if system not in published_all:
            continue
        summary = published_all[system]
        told = [
            f"{name} {100.0 * stated:.6g} (cells: {100.0 * float(computed.value):.1f})"
            for name, stated, computed in (
                ("mean", printed.mean, summary.mean),
                ("median", printed.median, summary.median),
            )
            if stated is not None and abs(stated - computed.value) > _ROUNDING
        ]
        count = int(summary.superhuman.value)
        if printed.superhuman is not None and printed.superhuman != count:
            told.append(
                f"{printed.superhuman} games at or above human (cells: {count})"
            )
        if told:
            notices.append(f"{system}: its table prints {', '.join(told)}.")
    return notices


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
    values, over = _seed_means(runs), "seeds"
    if len(runs) == 1:
        values = runs[0].returns
        over = "games" if values.size > 1 else "nothing"
    score = bootstrap(estimates.mean, [values])
    normalized = None
    if game in normalized_scores(method):
        normalized = estimates.Estimate(
            *(scores.human_normalized_score(game, value) for value in score)
        )
    return Cell(score, normalized, len(runs), over)


def _summary(groups: estimates.Scores, bootstrap: _Bootstrap) -> Summary:
    return Summary(
        len(groups),
        bootstrap(estimates.mean, groups),
        bootstrap(estimates.median, groups),
        bootstrap(estimates.interquartile_mean, groups),
        bootstrap(estimates.optimality_gap, groups),
        bootstrap(estimates.superhuman_count, groups),
    )


def _comparisons(
    methods: Sequence[Method], bootstrap: _Bootstrap
) -> tuple[Comparison, ...]:
    """Compares pretrained methods with scratch, then with each other.

    Scratch must share every setting but pretraining's; pretrained methods must share
    the protocol, and their labels tell the rest.
    """
    pretrained = [method for method in methods if method.arm == PRETRAINED]
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
    def gain(
        statistic: Callable[..., Any], *groups: estimates.Scores
    ) -> estimates.Estimate:
        return bootstrap(lambda x, y: statistic(x) - statistic(y), *groups)

    improvement = estimates.probability_of_improvement
    games = []
    for game in sorted(method.runs.keys() & baseline.runs.keys()):
        groups = [[_seed_means(one.runs[game])] for one in (method, baseline)]
        games.append(
            GameGain(
                game, gain(estimates.mean, *groups), bootstrap(improvement, *groups)
            )
        )
    ours, theirs = normalized_scores(method), normalized_scores(baseline)
    shared = sorted(ours.keys() & theirs.keys())
    groups = [[side[game] for game in shared] for side in (ours, theirs)]
    return Comparison(
        method.label,
        baseline.label,
        len(shared),
        bootstrap(improvement, *groups) if shared else None,
        gain(estimates.mean, *groups) if shared else None,
        gain(estimates.interquartile_mean, *groups) if shared else None,
        tuple(games),
    )


def _profiles(
    normalized: Mapping[str, Mapping[str, np.ndarray]],
    published: Mapping[str, list[np.ndarray]],
    bootstrap: _Bootstrap,
) -> Profiles:
    """Computes profiles on thresholds that show both the runs and human level."""
    methods = {label: list(by_game.values()) for label, by_game in normalized.items()}
    pooled = np.concatenate([[0.0], *itertools.chain.from_iterable(methods.values())])
    high = min(max(1.5, 1.1 * float(pooled.max())), 4.0)
    thresholds = np.linspace(float(pooled.min()), high, _NUM_THRESHOLDS)
    profile = functools.partial(estimates.performance_profile, thresholds=thresholds)
    return Profiles(
        thresholds,
        {label: bootstrap(profile, groups) for label, groups in methods.items()},
        {system: profile(groups) for system, groups in published.items()},
    )
