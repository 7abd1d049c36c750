"""Frozen descriptions of a run, each of which checks itself when it is built.

Every field carries its own help text, from which `experiments.common_flags` makes the
flag of the same name: a value is declared, explained and bounded in one place. The
agent's options are declared by its own file. Counts say their unit: frames (emulator
frames; in a world an agent step is one), agent steps, or updates (gradient steps).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

from absl import logging

from aps_jax import agents, options
from aps_jax.agents import base
from aps_jax.envs import atari, games
from aps_jax.options import option
from aps_jax.types import ObservationSpec

DEFAULT_AGENT = "aps"


@dataclasses.dataclass(frozen=True)
class EnvironmentConfig:
    """How a game is presented: the same in every stage of a run."""

    noop_max: int = option(
        30,
        "Random no-op agent steps at the start of a game, at most.",
        low=1,
        high=1000,
        compared=False,
    )
    sticky: float = option(
        0.0,
        "Probability that the emulator repeats the last action.",
        low=0.0,
        high=1.0,
        compared=False,
    )
    max_frames: int = option(
        108_000,
        "Emulator frames after which a game is cut.",
        low=atari.FRAME_SKIP,
        compared=False,
    )
    fire_reset: bool = option(
        False, "Whether FIRE is pressed once at the start of each game."
    )
    env_threads: int = option(
        0,
        "Threads that step the emulators; 0 takes all cores.",
        low=0,
        high=1024,
        compared=False,
    )

    def __post_init__(self) -> None:
        options.check(self)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """The reward-free stage."""

    pretrain_frames: int = option(
        200_000_000,
        "Emulator frames played without reward.",
        low=1,
        compared=False,
    )
    num_envs: int = option(
        64, "Environments that pretraining steps together.", low=1, high=65536
    )
    replay_size: int = option(
        1_000_000, "Agent steps that the replay of pretraining holds.", low=1
    )
    warmup_agent_steps: int = option(
        20_000, "Agent steps played before the first update of pretraining.", low=1
    )
    samples_per_step: float = option(
        3.2,
        "TD targets replayed per agent step of pretraining.",
        low=0.0,
        high=1e6,
    )

    def __post_init__(self) -> None:
        options.check(self)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """The stage that sees the reward: inference of the task, then TD learning."""

    reward: str = option(
        "score",
        "What is rewarded: score, survival (lives kept, per agent step), or your own "
        "module:function of two time steps.",
    )
    finetune_agent_steps: int = option(
        100_000,
        "Agent steps with reward in all, inference included.",
        low=1,
        compared=False,
    )
    infer_agent_steps: int = option(
        40_000,
        "Agent steps played as in pretraining, to whose rewards the agent adapts.",
        low=1,
    )
    finetune_warmup_agent_steps: int = option(
        0,
        "Agent steps of fine-tuning before its first update, inference included.",
        low=0,
    )
    finetune_num_envs: int = option(
        8, "Environments that fine-tuning steps together.", low=1, high=65536
    )
    finetune_samples_per_step: float = option(
        32.0,
        "TD targets replayed per agent step of learning.",
        low=0.0,
        high=1e6,
    )

    def __post_init__(self) -> None:
        options.check(self)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The protocol of every score: full games, unclipped, apart from training."""

    eval_episodes: int = option(
        100,
        "Full games of one evaluation, one environment each.",
        low=1,
        high=4096,
        compared=False,
    )
    eval_epsilon: float = option(
        0.001,
        "Probability of a random action in evaluation.",
        low=0.0,
        high=1.0,
        compared=False,
    )
    evaluations: int = option(
        2,
        "Evaluations of a fine-tuning: the last after learning, the others evenly "
        "spaced from inference (zero-shot) on.",
        low=1,
        high=1000,
        compared=False,
    )
    eval_agent_steps: str = option(
        "",
        "Agent steps of fine-tuning after which to evaluate, separated by commas, "
        "besides zero-shot and the end; empty spaces `evaluations` evenly.",
        compared=False,
    )

    def __post_init__(self) -> None:
        options.check(self)
        words = self.eval_agent_steps.split(",") if self.eval_agent_steps else []
        if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
            raise ValueError(
                "eval_agent_steps must be positive numbers separated by commas, got "
                f"{self.eval_agent_steps!r}."
            )

    @property
    def set_agent_steps(self) -> tuple[int, ...]:
        """The agent steps in `eval_agent_steps`."""
        if not self.eval_agent_steps:
            return ()
        return tuple(int(word) for word in self.eval_agent_steps.split(","))


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """How often a stage says how it goes, and how often it saves."""

    report_agent_steps: int = option(
        50_000, "Agent steps between two rows of metrics.", low=1, compared=False
    )
    checkpoint_agent_steps: int = option(
        2_500_000,
        "Agent steps between two checkpoints.",
        low=1,
        compared=False,
        resumable=True,
    )
    skill_steps: int = option(
        128,
        "Agent steps of each environment that are played for each checkpoint of "
        "pretraining, to measure whether task vectors are obeyed; 0 for none.",
        low=0,
        compared=False,
        resumable=True,
    )
    wandb: bool = option(
        False,
        "Whether metrics go to Weights & Biases too, besides TensorBoard.",
        compared=False,
    )
    checkpoint_replay: bool = option(
        True,
        "Whether checkpoints hold the replay; without it they are small, and a resumed "
        "run plays for a while before it learns again.",
        resumable=True,
    )
    keep_checkpoints: int = option(
        2, "Newest checkpoints that are kept.", low=1, resumable=True
    )
    keep_every_frames: int = option(
        0,
        "Also keep the first checkpoint after each multiple of this many emulator "
        "frames; 0 for none.",
        low=0,
        resumable=True,
    )
    keep_best: bool = option(
        False,
        "Also keep the checkpoint with the best score so far: of the last evaluation, "
        "or before there is one of the last games played.",
        resumable=True,
    )

    def __post_init__(self) -> None:
        options.check(self)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run: which game, which agent, which values."""

    game: str = option(
        "Pong",
        "Atari game in EnvPool's spelling, such as Pong, or a world: minatar/NAME, "
        "maze/NAME or maze/NAME/pixels.",
        compared=False,
    )
    seed: int = option(
        0, "Root of every random stream of the run.", low=0, compared=False
    )
    preset: str = option(
        "paper", "Preset on which the values are based.", compared=False
    )
    agent: str = option(
        DEFAULT_AGENT,
        "Which agent: "
        + ", ".join(f"{name} ({e.about})" for name, e in agents.AGENTS.items())
        + ".",
        choices=tuple(agents.AGENTS),
        compared=False,
    )
    num_devices: int = option(
        1,
        "Devices that share environments, replay and batch, of all hosts together.",
        low=1,
        high=1024,
        compared=False,
        resumable=True,
    )
    environment: EnvironmentConfig = EnvironmentConfig()
    learner: base.Config = dataclasses.field(
        default_factory=lambda: _learner_of(DEFAULT_AGENT, "paper")
    )
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()

    def __post_init__(self) -> None:
        options.check(self)
        learner, pretrain, finetune = self.learner, self.pretrain, self.finetune
        if not isinstance(learner, self.entry.config):
            wrong = f"The learner's options are not those of {self.agent}."
            raise ValueError(wrong)  # noqa: TRY004  A wrong value of the caller's.
        learner.check_fits(self.observation)
        if finetune.infer_agent_steps >= finetune.finetune_agent_steps and (
            self.has_pretraining
        ):
            raise ValueError(
                "infer_agent_steps must be less than finetune_agent_steps, which "
                f"includes them; got {finetune.infer_agent_steps} and "
                f"{finetune.finetune_agent_steps}."
            )
        if self.num_devices > 1 and self._is_prioritised:
            raise ValueError(
                "Prioritised replay is for one device: give --num_devices=1, or "
                "--priority_exponent=0 to replay uniformly."
            )
        if max(self.evaluation.set_agent_steps, default=0) > (
            finetune.finetune_agent_steps
        ):
            raise ValueError(
                f"eval_agent_steps must not exceed the {finetune.finetune_agent_steps} "
                f"of finetune_agent_steps, got {self.evaluation.eval_agent_steps}."
            )
        sizes = {
            "num_envs": pretrain.num_envs,
            "finetune_num_envs": finetune.finetune_num_envs,
            **learner.sharded_sizes(),
        }
        for name, size in sizes.items():
            if size % self.num_devices:
                raise ValueError(
                    f"{name} must be a multiple of num_devices, so that every device "
                    f"gets as many; got {size} and {self.num_devices}."
                )
        for stage, envs, size in (
            ("pretraining", pretrain.num_envs, pretrain.replay_size),
            (
                "fine-tuning",
                finetune.finetune_num_envs,
                finetune.finetune_agent_steps,
            ),
        ):
            window_length = self.observation.stack - 1 + learner.window_states
            if size // envs < window_length:
                raise ValueError(
                    f"The replay of {stage} holds {size // envs} agent steps of each "
                    f"of {envs} environments, less than one window of {window_length}."
                )
        if self.pretrain_agent_steps < pretrain.num_envs:
            raise ValueError(
                f"pretrain_frames must give each of {pretrain.num_envs} environments "
                f"an agent step of {self.observation.frame_skip} frames, got "
                f"{pretrain.pretrain_frames}."
            )

    @property
    def entry(self) -> base.Entry:
        """The agent's entry in the table of agents."""
        return agents.AGENTS[self.agent]

    @property
    def has_pretraining(self) -> bool:
        """Whether the agent has a reward-free phase."""
        return self.make_agent(2, self.observation).pretrain is not None

    @property
    def observation(self) -> ObservationSpec:
        """What the game shows."""
        return games.observation_of(self.game)

    @property
    def pretrain_agent_steps(self) -> int:
        """Agent steps of pretraining, of all environments together."""
        return self.pretrain.pretrain_frames // self.observation.frame_skip

    @property
    def _is_prioritised(self) -> bool:
        learner = self.make_agent(2, self.observation).finetune.learner
        return learner.batch.priorities is not None

    def make_agent(self, num_actions: int, observation: ObservationSpec) -> base.Agent:
        """Makes the agent for a game of that many actions that is seen so."""
        return _make_agent(
            cast(Any, self.entry.make), self.learner, num_actions, observation
        )


# The same functions for the same values, so that their programs are compiled once.
@functools.lru_cache(maxsize=8)
def _make_agent(make: Callable[..., base.Agent], *values: Any) -> base.Agent:
    return make(*values)


_SECTIONS: dict[str, Any] = {
    field.name: field.type
    for field in dataclasses.fields(Config)
    if "help" not in field.metadata
}
_LEARNER = "learner"


def _learner_of(agent: str, preset: str) -> base.Config:
    entry = agents.AGENTS[agent]
    values = {**entry.options, **entry.presets.get(preset, {})}
    known = options.fields_of(entry.config)
    return entry.config(**{name: x for name, x in values.items() if name in known})


def _run_values_of(agent: str, preset: str) -> dict[str, Any]:
    """Returns the values of a run's options, not the agent's own, by preset."""
    entry = agents.AGENTS[agent]
    values = {**PRESETS.get(preset, {}), **entry.presets.get(preset, {})}
    own = options.fields_of(entry.config)
    return {name: x for name, x in values.items() if name not in own}


def option_fields(agent: str) -> dict[str, tuple[str | None, dataclasses.Field]]:
    """Returns every option of a run of an agent: its section and its field.

    The section is None for options of the config itself.
    """
    found: dict[str, tuple[str | None, dataclasses.Field]] = {
        name: (None, field) for name, field in options.fields_of(Config).items()
    }
    for section, kind in _SECTIONS.items():
        if section == _LEARNER:
            kind = agents.AGENTS[agent].config
        for name, field in options.fields_of(kind).items():
            if name in found:
                raise ValueError(f"Two config sections declare {name}.")
            found[name] = (section, field)
    return found


@functools.cache
def agents_with(name: str) -> tuple[str, ...]:
    """Returns the agents whose runs have an option."""
    return tuple(agent for agent in agents.AGENTS if name in option_fields(agent))


@functools.cache
def all_option_fields() -> dict[str, dataclasses.Field]:
    """Returns the options of all agents' runs by name.

    Raises:
      TypeError: Two agents declare an option of one name with different types.
    """
    found: dict[str, dataclasses.Field] = {}
    for agent in agents.AGENTS:
        for name, (_, field) in option_fields(agent).items():
            if found.setdefault(name, field).type is not field.type:
                raise TypeError(f"Agents declare {name} with different types.")
    return found


def replace_options(config: Config, **values: Any) -> Config:
    """Returns `config` with options replaced, whichever section they belong to.

    Naming another agent gives it that agent's own values for the config's preset.

    Raises:
      ValueError: An option does not exist or not for this agent, has the wrong type, or
        is out of bounds.
    """
    agent = values.get("agent", config.agent)
    top: dict[str, Any] = {}
    if agent in agents.AGENTS and agent != config.agent:
        preset = values.get("preset", config.preset)
        top[_LEARNER] = _learner_of(agent, preset)
        before = _run_values_of(config.agent, preset)
        after = _run_values_of(agent, preset)
        config = dataclasses.replace(config, agent=agent, **top)
        defaults = option_fields(agent)
        values = {
            **{name: defaults[name][1].default for name in set(before) - set(after)},
            **dict(after.items() - before.items()),
            **values,
        }
    fields = option_fields(config.agent)
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(_unknown(name, config.agent))
        section, field = fields[name]
        if field.type is float and type(value) is int:
            value = float(value)
        if section is None:
            top[name] = value
        else:
            sections.setdefault(section, {})[name] = value
    for section, inner in sections.items():
        top[section] = dataclasses.replace(getattr(config, section), **inner)
    return dataclasses.replace(config, **top)


def _unknown(name: str, agent: str) -> str:
    having = agents_with(name)
    if not having:
        return f"There is no option {name!r}."
    return f"Agent {agent} has no option {name}; these have: {', '.join(having)}."


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested dictionaries of plain values."""
    return dataclasses.asdict(config)


def from_dict(
    values: dict[str, Any], notice: Callable[[str], None] = logging.warning
) -> Config:
    """Builds a config from what `to_dict` returned, for example out of a JSON file.

    `notice` is told of each option that is missing, and takes its default.

    Raises:
      ValueError: A section or option is unknown, or a value is not valid.
    """
    top = {name: value for name, value in values.items() if name not in _SECTIONS}
    agent = top.get("agent", DEFAULT_AGENT)
    if agent not in agents.AGENTS:
        raise ValueError(
            f"agent must be one of {', '.join(agents.AGENTS)}, got {agent}."
        )
    sections = {}
    for section, kind in _SECTIONS.items():
        if section == _LEARNER:
            kind = agents.AGENTS[agent].config
        if section not in values:
            notice(f"section {section} is missing and takes its defaults")
        inner = values.get(section, {})
        try:
            sections[section] = options.from_dict(kind, inner, notice)
        except ValueError as error:
            raise ValueError(f"Section {section}: {error}") from error
    unknown = sorted(set(top) - set(options.fields_of(Config)))
    if unknown:
        raise ValueError(f"Unknown options {', '.join(unknown)}.")
    return Config(**options.converted(top, Config), **sections)


# Values of a run by preset; each agent has its own options' values beside them.
PRESETS: dict[str, dict[str, Any]] = {
    # Seconds: every line of the program runs once, nothing is learned.
    "smoke": {
        "pretrain_frames": 1_600,
        "num_envs": 4,
        "replay_size": 400,
        "warmup_agent_steps": 120,
        "samples_per_step": 0.5,
        "finetune_agent_steps": 240,
        "infer_agent_steps": 120,
        "finetune_num_envs": 4,
        "finetune_samples_per_step": 0.5,
        "max_frames": 400,
        "eval_episodes": 2,
        "skill_steps": 0,
        "report_agent_steps": 100,
        "checkpoint_agent_steps": 200,
    },
    # Minutes on two cores, with a small encoder: shows that the machine works.
    "cpu": {
        "pretrain_frames": 320_000,
        "num_envs": 16,
        "replay_size": 50_000,
        "warmup_agent_steps": 2_000,
        "finetune_agent_steps": 12_000,
        "infer_agent_steps": 5_000,
        "finetune_num_envs": 8,
        "eval_episodes": 10,
        "report_agent_steps": 4_000,
        "checkpoint_agent_steps": 50_000,
    },
    # The paper's quantities, with many environments and large batches.
    "gpu": {
        "num_envs": 128,
        "samples_per_step": 8.0,
        "report_agent_steps": 100_000,
    },
    # The talk's and the papers' own values.
    "paper": {},
    # MinAtar with the encoder of its paper, in sizes for two cores.
    "minatar": {
        "game": "minatar/Breakout",
        "pretrain_frames": 1_000_000,
        "num_envs": 32,
        "replay_size": 100_000,
        "warmup_agent_steps": 5_000,
        "samples_per_step": 8.0,
        "finetune_agent_steps": 200_000,
        "infer_agent_steps": 10_000,
        "finetune_num_envs": 16,
        "finetune_samples_per_step": 8.0,
        "eval_episodes": 30,
        "report_agent_steps": 10_000,
        "checkpoint_agent_steps": 250_000,
    },
    # One-hot mazes, in sizes for two cores.
    "maze": {
        "game": "maze/four_rooms",
        "pretrain_frames": 100_000,
        "num_envs": 32,
        "replay_size": 50_000,
        "warmup_agent_steps": 2_000,
        "samples_per_step": 8.0,
        "finetune_agent_steps": 20_000,
        "infer_agent_steps": 4_000,
        "finetune_num_envs": 16,
        "finetune_samples_per_step": 8.0,
        "eval_episodes": 10,
        "report_agent_steps": 4_000,
        "checkpoint_agent_steps": 50_000,
    },
    # The protocol of 100,000 agent steps (400,000 frames) from scratch, as the talk's
    # rivals are run: one environment, one update per agent step.
    "atari100k": {
        "finetune_num_envs": 1,
        "finetune_warmup_agent_steps": 1_600,
        "evaluations": 1,
        "report_agent_steps": 5_000,
        "checkpoint_agent_steps": 25_000,
    },
}


def preset_config(preset: str, agent: str = DEFAULT_AGENT) -> Config:
    """Returns the config of a preset for an agent.

    Raises:
      ValueError: There is no such preset or agent.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    if agent not in agents.AGENTS:
        raise ValueError(
            f"agent must be one of {', '.join(agents.AGENTS)}, got {agent!r}."
        )
    values = _run_values_of(agent, preset)
    config = Config(
        game=values.get("game", Config.game),
        agent=agent,
        preset=preset,
        learner=_learner_of(agent, preset),
    )
    return replace_options(config, **values)
