"""What an agent is: the types that every agent file fills and the loop calls.

An agent sees plain, global arrays. It knows no device, file, flag or stage. Letters:
`E` environments, `B` windows, `T` states of a window, `P` particles.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from aps_jax import options
from aps_jax.networks import modules
from aps_jax.ops import losses, returns
from aps_jax.options import option
from aps_jax.replay.buffer import Extras, Indices, States, Window
from aps_jax.types import Array, Metric, ObservationSpec, Params, PRNGKey

IMAGE_ENCODERS = {
    "small": modules.SmallEncoder,
    "nature": modules.NatureEncoder,
    "paper": modules.PaperEncoder,
    "small_valid": modules.SmallValidEncoder,
    "nature_same": modules.NatureSameEncoder,
}
PLANE_ENCODERS = {"minatar": modules.MinAtarEncoder, "mlp": modules.MlpEncoder}
ENCODERS: dict[str, Any] = {**IMAGE_ENCODERS, **PLANE_ENCODERS}

# What the presets of worlds share: small networks, a step that is one frame.
WORLD_VALUES = {"n_steps": 3, "batch_size": 64, "learning_rate": 5e-4}

LEARNING = (
    Metric("loss_td", "-", "Half the squared TD error, summed over its components."),
    Metric("td_error", "-", "Norm of the TD error of a replayed target."),
    Metric("q_value", "-", "Value of replayed actions under the learned policy."),
    Metric("gradient_norm", "-", "Norm of the whole gradient before clipping."),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Options that all agents share; an agent's own config adds to them."""

    encoder: str = option("paper", "Encoder of the networks.", choices=tuple(ENCODERS))
    hidden_units: int = option(
        512, "Units of the hidden layer of each head.", low=1, high=65536
    )
    bfloat16: bool = option(
        False, "Whether the networks compute in bfloat16 (parameters stay float32)."
    )
    n_steps: int = option(
        10, "Agent steps summed before a target bootstraps.", low=1, high=1000
    )
    discount: float = option(
        0.99, "Discount gamma of one agent step.", low=0.0, high=1.0
    )
    batch_size: int = option(32, "TD targets in one update (replayed samples).", low=1)
    window_targets: int = option(
        1,
        "Consecutive TD targets taken from one replayed window; more share the "
        "encoding of their states, fewer are less correlated.",
        low=1,
    )
    learning_rate: float = option(1e-4, "Adam's rate for the values' network.", low=0.0)
    adam_epsilon: float = option(
        1.5e-4,
        "Added to the denominator of Adam's step, in the unit of the values.",
        low=0.0,
    )
    max_gradient_norm: float = option(
        10.0, "Norm to which each network's gradient is clipped.", low=1e-12
    )
    target_period: int = option(
        100, "Updates between copies of the network to its target.", low=1
    )
    reward_clip: float = option(
        1.0,
        "Bound of the reward of one agent step for learning and inference; 0 leaves "
        "it unclipped. Scores are never clipped.",
        low=0.0,
    )
    cut_at_life_loss: bool = option(
        True, "Whether a lost life cuts bootstrapping when learning from reward."
    )
    finetune_epsilon: float = option(
        0.05,
        "Probability of a random action while learning from reward.",
        low=0.0,
        high=1.0,
    )

    def __post_init__(self) -> None:
        options.check(self)
        if self.batch_size % self.window_targets:
            raise ValueError(
                "batch_size must be a multiple of window_targets, got "
                f"{self.batch_size} and {self.window_targets}."
            )

    @property
    def window_states(self) -> int:
        """States of one window: its targets and the steps that the last one sums."""
        return self.window_targets + self.n_steps

    def check_fits(self, observation: ObservationSpec) -> None:
        """Checks that the networks are made for what an agent sees.

        Raises:
          ValueError: They are not.
        """
        check_encoder(self, observation)

    def sharded_sizes(self) -> dict[str, int]:
        """Returns what every device gets an equal part of, by the option's name."""
        return {
            "batch_size / window_targets (replayed windows)": (
                self.batch_size // self.window_targets
            )
        }


class AgentState(NamedTuple):
    """All that an agent has learned; the same type for every agent."""

    params: Mapping[str, Params]  # what gradients train, by network
    target_params: Params  # slow copies; {} where there are none
    opt_state: optax.OptState
    stats: Any  # what no gradient trains: moments, queues, the inferred task
    num_updates: jax.Array  # [] int32, since this stage began


class Observation(NamedTuple):
    """What an agent sees of `E` environments."""

    frames: Array  # [E, *observation.shape] uint8, newest frame last
    is_first: Array  # [E] bool, the first observation of an episode


class Decision(NamedTuple):
    """What an agent does in `E` environments, and what it wants replayed with it."""

    action: jax.Array  # [E] int32
    extras: Extras  # each [E, ...]


class Policy(NamedTuple):
    """How an agent acts."""

    # Number of environments E -> memory, a pytree with leading axis E.
    init: Callable[[int], Any]
    # state, memory, observation, key (consumed) -> memory, decision
    act: Callable[[AgentState, Any, Observation, PRNGKey], tuple[Any, Decision]]
    observation: ObservationSpec  # of what it sees, as `MakeAgent` was given it


class BatchSpec(NamedTuple):
    """What `Learner.update` wants; the loop draws it."""

    num_samples: int  # TD targets in the batch, by which updates are scheduled
    num_windows: int  # B
    num_states: int  # T
    num_particles: int = 0  # P, further states drawn from the whole replay
    priorities: "Prioritised | None" = None  # None: windows are drawn uniformly
    states: States | None = None  # whose observations it looks at; None: at all


class Prioritised(NamedTuple):
    """How windows are drawn by what they taught when they were last learned from."""

    exponent: float  # alpha, to which priorities are raised
    importance: optax.Schedule  # number of the update -> beta, of importance weights


class Batch(NamedTuple):
    """What an update learns from: global arrays, however many devices there are."""

    windows: Window  # [B, T, ...]; its reward is None in a reward-free phase
    particles: Any  # what `Learner.encode` returns of [P] states; None without any
    weight: jax.Array | None = None  # [B], importance; None where drawn uniformly
    places: Indices | None = None  # [B], of first states, whose priorities are set


class Updated(NamedTuple):
    """What an update leaves."""

    state: AgentState
    metrics: dict[str, jax.Array]  # exactly those declared, each []
    priorities: jax.Array | None = None  # [B], not negative; None: drawn uniformly


class Learner(NamedTuple):
    """How an agent learns."""

    batch: BatchSpec
    # state, batch, key (consumed) ->
    update: Callable[[AgentState, Batch, PRNGKey], Updated]
    metrics: tuple[Metric, ...]
    # Reduces particles to what the update needs of them: state, windows of one state
    # [P, 1, ...] -> a pytree [P, ...]. It must treat each by itself.
    encode: Callable[[AgentState, Window], Any] | None = None


class Phase(NamedTuple):
    """An agent's policy and learner in one stage; programs are kept by it, as a key."""

    policy: Policy
    learner: Learner


class Rollouts(NamedTuple):
    """What was played before an agent adapts: all that the replay holds, in order."""

    reward: np.ndarray  # [N] float32, unclipped
    is_first: np.ndarray  # [N] bool
    # Maps a function of windows of one state [C, 1, ...] over all, chunk by chunk;
    # returns its results as host arrays [N, ...].
    encode: Callable[[Callable[[AgentState, Window], Any], AgentState], Any]


class Agent(NamedTuple):
    """An agent's pure functions.

    The policies of both phases have memories of the same structure, so that a session
    can pass from one to the other.
    """

    init: Callable[[PRNGKey], AgentState]
    pretrain: Phase | None  # None: it learns from reward alone
    finetune: Phase
    # Makes a policy to be evaluated, from a probability of random actions.
    play: Callable[[float], Policy]
    # The same right after `adapt`, before anything is learned from reward.
    play_adapted: Callable[[float], Policy]
    # The same for a random skill in each environment, told by the decision's extras;
    # None where there are no skills.
    play_skills: Callable[[float], Policy] | None
    # Takes statistics of states [N, 1, ...] drawn from the replay of pretraining;
    # called before the agent is saved. It must not change what is learned.
    calibrate: Callable[[AgentState, Window], AgentState]
    # Starts learning from reward: fresh optimiser and counter, state of the same type.
    start_finetune: Callable[[AgentState], AgentState]
    # On the host, after `start_finetune`: key, state, rollouts (None: from scratch) ->
    # state, facts for `result.json`; facts["summary"] is a sentence for the user.
    adapt: Callable[
        [PRNGKey, AgentState, Rollouts | None], tuple[AgentState, dict[str, Any]]
    ]
    # What a picture of visited states shows, of windows of one state: by name [N, D].
    embed: Callable[[AgentState, Window], dict[str, jax.Array]] | None = None
    # With skills: the discounted sum [N] of phi^T w that greedy play of a window's task
    # is predicted to meet from its one state on.
    predict: Callable[[AgentState, Window], jax.Array] | None = None


class MakeAgent(Protocol):
    """Binds a config to an agent's pure functions."""

    def __call__(
        self, config: Any, num_actions: int, observation: ObservationSpec
    ) -> Agent:
        """Makes the agent; `config` is of the agent's own class.

        Raises:
          ValueError: The encoder is not made for such observations.
        """


class Entry(NamedTuple):
    """An agent's entry in the table of agents."""

    make: MakeAgent
    config: type[Config]
    about: str  # one line, for help and tables
    options: Mapping[str, Any]  # what makes it this agent, by its own option
    # By preset, values of its options and of the run's, before those above.
    presets: Mapping[str, Mapping[str, Any]]
    transferred: tuple[str, ...]  # options that a fine-tuning shares with its init


def check_encoder(config: Config, observation: ObservationSpec) -> None:
    """Checks that a config's encoder is made for what an agent sees.

    Raises:
      ValueError: It is not.
    """
    fitting = IMAGE_ENCODERS if observation.is_image else PLANE_ENCODERS
    if config.encoder not in fitting:
        kind = "grey images" if observation.is_image else "planes of 0 and 1"
        raise ValueError(
            f"encoder {config.encoder} does not fit {kind} of shape "
            f"{observation.shape}: give --encoder as one of {', '.join(fitting)}, or "
            "a preset that is made for the game."
        )


def make_encoder(config: Config, observation: ObservationSpec) -> Any:
    """Returns the encoder module that a config names.

    Raises:
      ValueError: It is not made for such observations.
    """
    check_encoder(config, observation)
    dtype = jnp.bfloat16 if config.bfloat16 else jnp.float32
    return ENCODERS[config.encoder](dtype=dtype)


def adam(config: Config, learning_rate: float) -> optax.GradientTransformationExtraArgs:
    """Returns Adam after clipping by the global norm.

    Its `update` takes `unit`, `[]` float: the unit of the values that are learned, 1 by
    default. A TD error's gradient has that unit; divided by it, epsilon means the same
    for values of every size, and does not swallow the gradients of small ones.
    """

    def divide(updates, state, params=None, *, unit=1.0, **others):
        del params, others
        return jax.tree.map(lambda g: g / unit, updates), state

    chain = optax.chain(
        optax.clip_by_global_norm(config.max_gradient_norm),
        optax.GradientTransformationExtraArgs(optax.init_empty_state, divide),
        optax.adam(learning_rate, eps=config.adam_epsilon),
    )
    # One vector: a GPU would launch several kernels for each array.
    return optax.flatten(chain)


def clip_rewards(r_t: Array | None, bound: float) -> jax.Array:
    """Clips rewards of any shape to [-bound, bound]; a bound of 0 leaves them alone.

    Raises:
      TypeError: There are none, because the phase is reward-free.
    """
    if r_t is None:
        raise TypeError("A batch of a reward-free phase has no reward.")
    return jnp.clip(r_t, -bound, bound) if bound else jnp.asarray(r_t)


def norm(tree: Any) -> jax.Array:
    """Returns the Euclidean norm of all arrays together."""
    # A GPU launches one kernel for one vector; a CPU would copy the arrays into it.
    return jax.lax.platform_dependent(
        tree,
        cpu=optax.tree.norm,
        default=lambda x: jnp.linalg.norm(jax.flatten_util.ravel_pytree(x)[0]),
    )


def apply_gradients(
    optimizer: optax.GradientTransformationExtraArgs,
    grads: Mapping[str, Params],
    state: AgentState,
    *,
    target: str,
    target_period: int,
    target_tau: float = 1.0,
    unit: float | jax.Array = 1.0,
) -> AgentState:
    """Makes one step of the optimiser, and moves a network's target when due.

    Args:
      optimizer: Whose state is `state.opt_state`.
      grads: Of `state.params`.
      state: The state before.
      target: The network of `params` whose slow copy `state.target_params` is.
      target_period: Updates between two copies.
      target_tau: How far the target then moves: 1 copies.
      unit: Of the values that are learned; see `adam`.
    """
    # Optax raises a Python float to the power of an integer array, which strict
    # promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, unit=unit
        )
    params = optax.apply_updates(state.params, updates)
    num_updates, moved = state.num_updates + 1, params[target]
    if target_tau < 1.0:
        moved = optax.incremental_update(moved, state.target_params, target_tau)
    # Not `optax.periodic_update`: for a condition a GPU would wait for the host.
    is_due = num_updates % target_period == 0
    return state._replace(
        params=params,
        target_params=jax.tree.map(
            lambda x, y: jnp.where(is_due, x, y), moved, state.target_params
        ),
        opt_state=opt_state,
        num_updates=num_updates,
    )


def take_states(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Picks states of each window: `[B, T, ...]`, `[B, ...]` int -> `[B, ..., ...]`."""
    return jax.vmap(lambda of_window, i: of_window[i])(x, indices)


def window_targets(
    config: Config, windows: Window, is_terminal: jax.Array, task: Any = None
) -> returns.Targets:
    """Lays out the TD targets `[B, m]` of windows; see `returns.window_targets`."""
    lay_out = functools.partial(
        returns.window_targets,
        num_targets=config.window_targets,
        n_steps=config.n_steps,
        discount=config.discount,
    )
    return jax.vmap(lay_out)(windows.is_first, is_terminal, task)


def reward_targets(config: Config, windows: Window) -> returns.Targets:
    """Lays out targets of the game's reward, which a lost life may end."""
    is_terminal = windows.terminated
    if config.cut_at_life_loss:
        is_terminal |= windows.life_lost
    return window_targets(config, windows, is_terminal)


def sum_steps(
    values: jax.Array, targets: returns.Targets
) -> tuple[jax.Array, jax.Array]:
    """Sums what states reach over each target's steps.

    Args:
      values: `[B, T - 1, ...]` float, of the windows' states from the second on.
      targets: `[B, m, ...]`.

    Returns:
      `[B, m, ...]` discounted sums, and `[B, m]` the discount of what follows.
    """
    steps = take_states(values, targets.rewarded - 1)  # [B, m, n, ...]
    weight = targets.weight.reshape(*targets.weight.shape, *(1,) * (steps.ndim - 3))
    return jax.vmap(jax.vmap(losses.n_step_cumulant))(steps * weight, targets.discount)


def from_reward_alone(
    init: Callable[[PRNGKey], AgentState],
    policy: Callable[[float], Policy],
    epsilon: float,
    learner: Learner,
) -> Agent:
    """Makes an agent that has no reward-free phase, and nothing to adapt.

    Args:
      init: Creates an untrained state.
      policy: Makes a policy from a probability of random actions.
      epsilon: That probability while learning.
      learner: Learns from reward.
    """
    return Agent(
        init=init,
        pretrain=None,
        finetune=Phase(policy(epsilon), learner),
        play=policy,
        play_adapted=policy,
        play_skills=None,
        calibrate=lambda state, windows: state,
        start_finetune=lambda state: state,
        adapt=lambda key, state, rollouts: (
            state,
            {"summary": "Learns from reward alone."},
        ),
    )
