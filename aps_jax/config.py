"""Frozen descriptions of a run, each of which checks itself when it is built.

Every field carries its own help text, from which `experiments.common_flags` makes the
flag of the same name: a value is declared, explained and bounded in one place.
Counts say their unit: frames (emulator frames), agent steps (`FRAME_SKIP` frames each),
or updates (gradient steps).
"""

import dataclasses
import math
import typing
from typing import Any

# One agent step repeats its action for this many emulator frames (every published
# Atari protocol that the project compares with does so).
FRAME_SKIP = 4
STACK_SIZE = 4

# (skill_weight, entropy_weight) of the intrinsic reward; APS, Sec. 4,
# https://arxiv.org/abs/2108.13956. VISR is the skill half alone, APT the entropy half.
AGENTS = {"aps": (1.0, 1.0), "visr": (1.0, 0.0), "apt": (0.0, 1.0)}
ENCODERS = ("small", "nature", "paper")
TD_FORMS = ("off_policy", "split", "vector", "scalar")


_MOST = 2**31 - 1  # of every count: on the device they are 32-bit integers.


def _option(
    default: Any,
    help_text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    compared: bool = True,
) -> Any:
    """Declares a config field: its default, its help and its inclusive bounds.

    An option is not `compared` if it cannot change what a run learns or scores, or if
    `result.json` tells it: runs that differ in it alone are runs of one method.
    """
    metadata = {
        "help": help_text,
        "low": low,
        "high": high,
        "choices": choices,
        "compared": compared,
    }
    return dataclasses.field(default=default, metadata=metadata)


def _check_fields(config: Any) -> None:
    """Raises a `ValueError` that names the first field out of its bounds."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        low, high = field.metadata["low"], field.metadata["high"]
        choices = field.metadata["choices"]
        if choices is not None and value not in choices:
            raise ValueError(
                f"{field.name} must be one of {', '.join(choices)}, got {value!r}."
            )
        if type(value) is int and value > _MOST:
            raise ValueError(f"{field.name} must be at most {_MOST}, got {value}.")
        # Comparisons are written so that NaN fails them.
        if low is not None and not value >= low:
            raise ValueError(f"{field.name} must be at least {low}, got {value}.")
        if high is not None and not value <= high:
            raise ValueError(f"{field.name} must be at most {high}, got {value}.")
        if type(value) is float and not math.isfinite(value):
            raise ValueError(f"{field.name} must be finite, got {value}.")


@dataclasses.dataclass(frozen=True)
class EnvironmentConfig:
    """How a game is presented: the same in every stage of a run."""

    noop_max: int = _option(
        30,
        "Random no-op agent steps at the start of a game, at most.",
        low=1,
        high=1000,
        compared=False,
    )
    sticky: float = _option(
        0.0,
        "Probability that the emulator repeats the last action.",
        low=0.0,
        high=1.0,
        compared=False,
    )
    max_frames: int = _option(
        108_000,
        "Emulator frames after which a game is cut.",
        low=FRAME_SKIP,
        compared=False,
    )
    fire_reset: bool = _option(
        False, "Whether FIRE is pressed once at the start of each game."
    )
    env_threads: int = _option(
        0,
        "Threads that step the emulators; 0 takes all cores.",
        low=0,
        high=1024,
        compared=False,
    )

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """The networks, the objective and the optimiser."""

    encoder: str = _option(
        "paper", "Convolutional encoder of both networks.", choices=ENCODERS
    )
    hidden_units: int = _option(
        512, "Units of the hidden layer of each head.", low=1, high=65536
    )
    bfloat16: bool = _option(
        False, "Whether the networks compute in bfloat16 (parameters stay float32)."
    )
    feature_dim: int = _option(
        5, "Dimension D of features, task vectors and successors.", low=1, high=4096
    )
    skill_weight: float = _option(
        1.0, "Weight of phi(s)^T w in the intrinsic reward.", low=0.0
    )
    entropy_weight: float = _option(
        1.0, "Weight of the particle entropy in the intrinsic reward.", low=0.0
    )
    td_form: str = _option(
        "off_policy",
        "Target of the successor features: off_policy (phi and exploration apart, phi "
        "greedy for the task alone), split (greedy for both), vector, or scalar.",
        choices=TD_FORMS,
    )
    unit_values: bool = _option(
        True,
        "Whether cumulants are multiplied by 1 - discount, so that values have the "
        "size of a mean reward; no greedy action changes.",
    )
    whiten_features: bool = _option(
        True,
        "Whether features are made of mean 0 and covariance 1 over the replay before "
        "they are projected onto the sphere.",
    )
    num_neighbors: int = _option(
        12, "Nearest particles k that measure how new a state is.", low=1
    )
    num_particles: int = _option(
        256, "Replayed states that serve as particles in an update.", low=2
    )
    distance_offset: float = _option(
        1.0, "Constant c inside the logarithm of the entropy reward.", low=1e-6
    )
    distance_clip: float = _option(
        1e-4, "Scaled distance under which two states count as one.", low=0.0
    )
    scale_decay: float = _option(
        0.99,
        "Decay per update of the running mean distance; 1 never forgets.",
        low=0.0,
        high=1.0,
    )
    n_steps: int = _option(
        10, "Agent steps summed before a target bootstraps.", low=1, high=1000
    )
    discount: float = _option(
        0.99, "Discount gamma of one agent step.", low=0.0, high=1.0
    )
    task_steps: int = _option(
        10, "Agent steps for which an environment keeps its task.", low=1
    )
    gpi_tasks: int = _option(
        10,
        "Further task vectors over which zero-shot acting maximises (generalised "
        "policy improvement); 0 for none.",
        low=0,
        high=4096,
    )
    gpi_concentration: float = _option(
        5.0,
        "Concentration kappa of those task vectors around the task; 0 is uniform.",
        low=0.0,
    )
    learning_rate: float = _option(
        1e-4, "Adam's rate for the successor network.", low=0.0
    )
    feature_learning_rate: float = _option(
        1e-4, "Adam's rate for the feature network.", low=0.0
    )
    adam_epsilon: float = _option(
        1.5e-4,
        "Added to the denominator of Adam's step; for the successor network in the "
        "unit of its values.",
        low=0.0,
    )
    max_gradient_norm: float = _option(
        10.0, "Norm to which each network's gradient is clipped.", low=1e-12
    )
    batch_size: int = _option(32, "TD targets in one update (replayed samples).", low=1)
    window_targets: int = _option(
        1,
        "Consecutive TD targets taken from one replayed window; more share the "
        "encoding of their states, fewer are less correlated.",
        low=1,
    )
    target_period: int = _option(
        100, "Updates between copies of the successor network to its target.", low=1
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.num_neighbors >= self.num_particles:
            raise ValueError(
                "num_neighbors must be less than num_particles, because a state is "
                f"no neighbour of itself; got {self.num_neighbors} and "
                f"{self.num_particles}."
            )
        if self.batch_size % self.window_targets:
            raise ValueError(
                "batch_size must be a multiple of window_targets, got "
                f"{self.batch_size} and {self.window_targets}."
            )
        if self.unit_values and self.discount == 1.0:
            raise ValueError("unit_values needs a discount below 1, got 1.")
        if self.skill_weight == 0.0 and self.entropy_weight == 0.0:
            raise ValueError("skill_weight and entropy_weight must not both be 0.")

    @property
    def has_exploration_value(self) -> bool:
        """Whether a value of the entropy reward is learned apart from psi."""
        return self.td_form in ("off_policy", "split")

    @property
    def value_unit(self) -> float:
        """What cumulants are multiplied by before values are learned from them."""
        return 1.0 - self.discount if self.unit_values else 1.0

    @property
    def num_windows(self) -> int:
        """Replayed windows in one update."""
        return self.batch_size // self.window_targets

    @property
    def window_states(self) -> int:
        """States of one window: its targets and the steps that the last one sums."""
        return self.window_targets + self.n_steps

    @property
    def window_length(self) -> int:
        """Frames of one window: its states and the history of the first."""
        return STACK_SIZE - 1 + self.window_states


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """The reward-free stage."""

    pretrain_frames: int = _option(
        200_000_000,
        "Emulator frames played without reward.",
        low=FRAME_SKIP,
        compared=False,
    )
    num_envs: int = _option(
        64, "Environments that pretraining steps together.", low=1, high=65536
    )
    replay_size: int = _option(
        1_000_000, "Agent steps that the replay of pretraining holds.", low=1
    )
    warmup_agent_steps: int = _option(
        20_000, "Agent steps played before the first update of pretraining.", low=1
    )
    samples_per_step: float = _option(
        3.2,
        "TD targets replayed per agent step of pretraining.",
        low=0.0,
        high=1e6,
    )
    pretrain_epsilon: float = _option(
        0.05,
        "Probability of a random action while pretraining and inferring.",
        low=0.0,
        high=1.0,
    )

    def __post_init__(self) -> None:
        _check_fields(self)

    @property
    def pretrain_agent_steps(self) -> int:
        """Agent steps of all environments together."""
        return self.pretrain_frames // FRAME_SKIP


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """The stage that sees the reward: inference of the task, then TD learning."""

    task: str = _option(
        "score",
        "What is rewarded: score, survival (lives kept, per agent step), or your own "
        "module:function of two time steps.",
    )
    finetune_agent_steps: int = _option(
        100_000,
        "Agent steps with reward in all, inference included.",
        low=1,
        compared=False,
    )
    infer_agent_steps: int = _option(
        40_000,
        "Agent steps under random tasks from which the task is inferred, at most.",
        low=1,
    )
    infer_episodes: int = _option(
        10, "Finished games after which that phase ends early.", low=1
    )
    finetune_num_envs: int = _option(
        8, "Environments that fine-tuning steps together.", low=1, high=65536
    )
    finetune_samples_per_step: float = _option(
        32.0,
        "TD targets replayed per agent step of learning.",
        low=0.0,
        high=1e6,
    )
    finetune_epsilon: float = _option(
        0.05, "Probability of a random action while learning.", low=0.0, high=1.0
    )
    finetune_learning_rate: float = _option(
        1e-4, "Adam's rate for the successor network while fine-tuning.", low=0.0
    )
    reward_clip: float = _option(
        1.0,
        "Bound of the reward of one agent step for learning and inference; 0 leaves "
        "it unclipped. Scores are never clipped.",
        low=0.0,
    )
    cut_at_life_loss: bool = _option(
        True, "Whether a lost life cuts bootstrapping while fine-tuning."
    )
    ridge: float = _option(
        1e-3,
        "Ridge penalty of task inference, relative to the features' mean square.",
        low=0.0,
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.infer_agent_steps >= self.finetune_agent_steps:
            raise ValueError(
                "infer_agent_steps must be less than finetune_agent_steps, which "
                f"includes them; got {self.infer_agent_steps} and "
                f"{self.finetune_agent_steps}."
            )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The protocol of every score: full games, unclipped, apart from training."""

    eval_episodes: int = _option(
        100,
        "Full games of one evaluation, one environment each.",
        low=1,
        high=4096,
        compared=False,
    )
    eval_epsilon: float = _option(
        0.001,
        "Probability of a random action in evaluation.",
        low=0.0,
        high=1.0,
        compared=False,
    )
    evaluations: int = _option(
        2,
        "Evaluations of a fine-tuning: the last after learning, the others evenly "
        "spaced from inference (zero-shot) on.",
        low=1,
        high=1000,
        compared=False,
    )
    eval_agent_steps: str = _option(
        "",
        "Agent steps of fine-tuning after which to evaluate, separated by commas, "
        "besides zero-shot and the end; empty spaces `evaluations` evenly.",
        compared=False,
    )

    def __post_init__(self) -> None:
        _check_fields(self)
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

    report_agent_steps: int = _option(
        50_000, "Agent steps between two rows of metrics.", low=1, compared=False
    )
    checkpoint_agent_steps: int = _option(
        2_500_000, "Agent steps between two checkpoints.", low=1, compared=False
    )
    wandb: bool = _option(
        False,
        "Whether metrics go to Weights & Biases too, besides TensorBoard.",
        compared=False,
    )
    checkpoint_replay: bool = _option(
        True,
        "Whether checkpoints hold the replay; without it they are small, and a resumed "
        "run plays for a while before it learns again.",
    )
    keep_checkpoints: int = _option(2, "Newest checkpoints that are kept.", low=1)
    keep_every_frames: int = _option(
        0,
        "Also keep the first checkpoint after each multiple of this many emulator "
        "frames; 0 for none.",
        low=0,
    )
    keep_best: bool = _option(
        False,
        "Also keep the checkpoint with the best score so far: of the last evaluation, "
        "or before there is one of the last games played.",
    )

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run: which game, which agent, which values."""

    game: str = _option(
        "Pong", "Atari game in EnvPool's spelling, such as Pong.", compared=False
    )
    seed: int = _option(
        0, "Root of every random stream of the run.", low=0, compared=False
    )
    preset: str = _option(
        "paper", "Preset on which the values are based.", compared=False
    )
    agent: str = _option(
        "aps",
        "Weights of the intrinsic reward: aps (1, 1), visr (1, 0) or apt (0, 1).",
        choices=tuple(AGENTS),
        compared=False,
    )
    num_devices: int = _option(
        1,
        "Devices that share environments, replay and batch, those of all hosts together.",
        low=1,
        high=1024,
    )
    environment: EnvironmentConfig = EnvironmentConfig()
    learner: AgentConfig = AgentConfig()
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()

    def __post_init__(self) -> None:
        learner, pretrain, finetune = self.learner, self.pretrain, self.finetune
        if max(self.evaluation.set_agent_steps, default=0) > (
            finetune.finetune_agent_steps
        ):
            raise ValueError(
                f"eval_agent_steps must not exceed the {finetune.finetune_agent_steps} "
                f"of finetune_agent_steps, got {self.evaluation.eval_agent_steps}."
            )
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}.")
        if self.num_devices < 1:
            raise ValueError(f"num_devices must be at least 1, got {self.num_devices}.")
        for name, count in (
            ("num_envs", pretrain.num_envs),
            ("finetune_num_envs", finetune.finetune_num_envs),
            ("num_particles", learner.num_particles),
            ("batch_size / window_targets (replayed windows)", learner.num_windows),
        ):
            if count % self.num_devices:
                raise ValueError(
                    f"{name} must be a multiple of num_devices, so that every device "
                    f"gets as many; got {count} and {self.num_devices}."
                )
        if self.seed > _MOST:
            raise ValueError(f"seed must be at most {_MOST}, got {self.seed}.")
        if self.agent not in AGENTS:
            raise ValueError(
                f"agent must be one of {', '.join(AGENTS)}, got {self.agent!r}."
            )
        for stage, envs, size in (
            ("pretraining", pretrain.num_envs, pretrain.replay_size),
            (
                "fine-tuning",
                finetune.finetune_num_envs,
                finetune.finetune_agent_steps,
            ),
        ):
            if size // envs < learner.window_length:
                raise ValueError(
                    f"The replay of {stage} holds {size // envs} agent steps of each "
                    f"of {envs} environments, less than one window of "
                    f"{learner.window_length}."
                )
        if pretrain.pretrain_agent_steps < pretrain.num_envs:
            raise ValueError(
                f"pretrain_frames must give each of {pretrain.num_envs} environments "
                f"an agent step of {FRAME_SKIP} frames, got {pretrain.pretrain_frames}."
            )


def section_names() -> tuple[str, ...]:
    """Returns the names of the sections of a `Config`, in their order."""
    return tuple(
        field.name
        for field in dataclasses.fields(Config)
        if dataclasses.is_dataclass(field.type)
    )


def option_fields() -> dict[str, tuple[str | None, dataclasses.Field]]:
    """Returns every option by name: its section (None at the top) and its field."""
    options: dict[str, tuple[str | None, dataclasses.Field]] = {}
    for field in dataclasses.fields(Config):
        if not dataclasses.is_dataclass(field.type):
            options[field.name] = (None, field)
            continue
        for inner in dataclasses.fields(field.type):
            if inner.name in options:
                raise ValueError(f"Two config sections declare {inner.name}.")
            options[inner.name] = (field.name, inner)
    return options


def replace_options(config: Config, **values: Any) -> Config:
    """Returns `config` with options replaced, whichever section they belong to.

    Args:
      config: The config to start from; it is not changed.
      **values: Values by option name.

    Returns:
      A new config.

    Raises:
      ValueError: An option does not exist, has the wrong type, or is out of bounds.
    """
    options = option_fields()
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in options:
            raise ValueError(f"There is no option {name!r}.")
        section, field = options[name]
        value = _checked_type(name, value, field.type)
        if section is None:
            top[name] = value
        else:
            sections.setdefault(section, {})[name] = value
    for section, inner in sections.items():
        top[section] = dataclasses.replace(getattr(config, section), **inner)
    return dataclasses.replace(config, **top)


def _checked_type(name: str, value: Any, expected: Any) -> Any:
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise ValueError(f"{name} must be {expected.__name__}, got {value!r}.")
    return value


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested dictionaries of plain values."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """Builds a config from what `to_dict` returned, for example out of a JSON file.

    Raises:
      ValueError: A section or option is missing or unknown, or a value is not valid.
    """
    hints = typing.get_type_hints(Config)
    known = set(hints)
    if set(values) != known:
        raise ValueError(
            "The config does not have this version's entries: missing "
            f"{sorted(known - set(values))}, unknown {sorted(set(values) - known)}."
        )
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if not dataclasses.is_dataclass(hints[name]):
            flat[name] = value
            continue
        inner_names = {field.name for field in dataclasses.fields(hints[name])}
        if set(value) != inner_names:
            raise ValueError(
                f"Section {name} of the config does not have this version's options: "
                f"missing {sorted(inner_names - set(value))}, unknown "
                f"{sorted(set(value) - inner_names)}."
            )
        flat.update(value)
    return replace_options(Config(), **flat)


# Presets set options; every option can still be given as a flag.
PRESETS: dict[str, dict[str, Any]] = {
    # Seconds: every line of the program runs once, nothing is learned.
    "smoke": {
        "encoder": "small",
        "hidden_units": 16,
        "num_particles": 8,
        "num_neighbors": 3,
        "n_steps": 3,
        "gpi_tasks": 2,
        "batch_size": 8,
        "window_targets": 2,
        "target_period": 5,
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
        "report_agent_steps": 100,
        "checkpoint_agent_steps": 200,
    },
    # Minutes on two cores, with a small encoder: shows that the machine works.
    "cpu": {
        "encoder": "small",
        "hidden_units": 128,
        "num_particles": 64,
        "task_steps": 40,
        "learning_rate": 5e-4,
        "feature_learning_rate": 5e-4,
        "batch_size": 64,
        "window_targets": 8,
        "pretrain_frames": 320_000,
        "num_envs": 16,
        "replay_size": 50_000,
        "warmup_agent_steps": 2_000,
        "finetune_agent_steps": 12_000,
        "infer_agent_steps": 5_000,
        "finetune_num_envs": 8,
        "finetune_samples_per_step": 8.0,
        "finetune_learning_rate": 5e-4,
        "eval_episodes": 10,
        "report_agent_steps": 4_000,
        "checkpoint_agent_steps": 50_000,
    },
    # The paper's quantities, with many environments and large batches.
    "gpu": {
        "encoder": "nature",
        "bfloat16": True,
        "num_particles": 1024,
        "batch_size": 1024,
        "window_targets": 4,
        "learning_rate": 3e-4,
        "feature_learning_rate": 3e-4,
        "num_envs": 128,
        "samples_per_step": 8.0,
        "report_agent_steps": 100_000,
    },
    # The talk's and the papers' own values.
    "paper": {},
}


def preset_config(preset: str) -> Config:
    """Returns the config of a preset.

    Raises:
      ValueError: There is no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    return replace_options(Config(), preset=preset, **PRESETS[preset])


def apply_options(config: Config, **values: Any) -> Config:
    """Returns `config` with options replaced, the agent's reward weights included.

    Naming an agent sets `skill_weight` and `entropy_weight` unless they are given too.

    Raises:
      ValueError: As `replace_options`, or an unknown agent.
    """
    agent = values.get("agent")
    if agent in AGENTS:
        skill_weight, entropy_weight = AGENTS[agent]
        values.setdefault("skill_weight", skill_weight)
        values.setdefault("entropy_weight", entropy_weight)
    return replace_options(config, **values)
