"""What an update, a run and a study cost, by formulas over a config and a few rates.

Pure arithmetic: nothing here measures. Letters: `N` devices, `W` windows of an update,
`m` targets of a window, `T` its states, `P` particles, `A` actions, `D` features, `G`
parameters of the two learned networks.
"""

import dataclasses
import math
from typing import NamedTuple

from aps_jax import agent as agent_lib
from aps_jax import config as config_lib
from aps_jax import resources
from aps_jax.config import FRAME_SKIP, STACK_SIZE

_SIDE = 84  # pixels of a frame
# Of an agent step: frame, reward, three flags, lives and the console's memory go to the
# device, and an action comes back.
_TRANSFER_BYTES = _SIDE**2 + 4 + 3 + 4 + 128 + 4
_FLOAT = 4
# Means that travel with the gradients: 8 scalars with their counts, and that of phi's.
_METRIC_FLOATS = 8 * 2 + 1


class Layer(NamedTuple):
    """A convolutional or dense layer."""

    weights: int
    biases: int
    uses: int  # of every weight for one state: the places of a convolution

    @property
    def flops(self) -> int:
        """Multiplications and additions of one state, forward."""
        return 2 * self.weights * self.uses

    @property
    def parameters(self) -> int:
        """Numbers that are learned."""
        return self.weights + self.biases


def dense(inputs: int, outputs: int, *, uses: int = 1, has_bias: bool = True) -> Layer:
    """Returns a dense layer, applied `uses` times for one state."""
    return Layer(inputs * outputs, outputs if has_bias else 0, uses)


def encoder_layers(learner: config_lib.AgentConfig) -> tuple[list[Layer], int]:
    """Returns the layers of a config's encoder, and the width of its output."""
    encoder = agent_lib.make_encoder(learner)
    side, channels, layers = _SIDE, STACK_SIZE, []
    for shape in encoder.layers:
        if shape.is_padded:
            side = -(-side // shape.stride)
        else:
            side = (side - shape.side) // shape.stride + 1
        weights = shape.side**2 * channels * shape.features
        layers.append(Layer(weights, shape.features, side**2))
        channels = shape.features
    width = side**2 * channels
    hidden = getattr(encoder, "hidden", None)
    if hidden is not None:
        layers.append(dense(width, hidden))
        width = hidden
    return layers, width


def feature_layers(learner: config_lib.AgentConfig) -> list[Layer]:
    """Returns the layers of the feature network."""
    layers, width = encoder_layers(learner)
    return [*layers, dense(width, learner.feature_dim)]


def successor_layers(
    learner: config_lib.AgentConfig, *, num_actions: int, num_tasks: int
) -> list[Layer]:
    """Returns the layers of the successor network, for so many tasks per state."""
    layers, width = encoder_layers(learner)
    hidden, dim = learner.hidden_units, learner.feature_dim
    layers += [
        dense(width, hidden),
        dense(dim, hidden, uses=num_tasks, has_bias=False),
        dense(hidden, num_actions * dim, uses=num_tasks),
    ]
    if learner.has_exploration_value:
        layers.append(dense(hidden, num_actions, uses=num_tasks))
    return layers


def forward_flops(layers: list[Layer]) -> int:
    """Counts one state's way through the layers."""
    return sum(layer.flops for layer in layers)


def both_flops(layers: list[Layer]) -> int:
    """Counts forward and backward: thrice as many, but no gradient of the pixels."""
    return 3 * forward_flops(layers) - layers[0].flops


def num_parameters(learner: config_lib.AgentConfig, num_actions: int) -> int:
    """Returns `G`."""
    both = feature_layers(learner) + successor_layers(
        learner, num_actions=num_actions, num_tasks=1
    )
    return sum(layer.parameters for layer in both)


def update_flops(learner: config_lib.AgentConfig, num_actions: int) -> int:
    """Counts an update of pretraining as an accelerator does it.

    The reached states' features with gradient, those of every state of a window and of
    the particles without; predictions for two tasks with gradient, and the target
    network's. Then the distances. The optimiser and the rest are left out: under 1 %.
    """
    windows, targets = learner.num_windows, learner.batch_size
    states = windows * learner.window_states
    particles, dim = learner.num_particles, learner.feature_dim
    features = feature_layers(learner)
    one, two = (
        successor_layers(learner, num_actions=num_actions, num_tasks=count)
        for count in (1, 2)
    )
    return (
        targets * both_flops(features)
        + (states + particles) * forward_flops(features)
        + targets * both_flops(two)
        + targets * forward_flops(one)
        + (states - windows) * particles * 3 * dim
    )


class Traffic(NamedTuple):
    """Bytes of the three collectives of an update of pretraining."""

    gathered: int
    summed_early: int
    summed: int


def update_traffic(
    learner: config_lib.AgentConfig, *, num_actions: int, num_devices: int
) -> Traffic:
    """Returns what the collectives of an update hold, of all devices together."""
    dim, targets = learner.feature_dim, learner.window_targets
    particles = learner.num_particles * (dim + 1)  # features and ids
    parameters = num_parameters(learner, num_actions)
    return Traffic(
        gathered=_FLOAT * (particles + num_devices * targets * dim),
        summed_early=_FLOAT * (dim + 3),
        summed=_FLOAT * (parameters + dim + _METRIC_FLOATS),
    )


def sent_bytes(traffic: Traffic, num_devices: int) -> float:
    """Returns what each device sends in an update, around a ring.

    `(N - 1) / N` of what is gathered, and twice that of what is summed.
    """
    share = (num_devices - 1) / num_devices
    return share * (traffic.gathered + 2 * (traffic.summed_early + traffic.summed))


def network_seconds(
    traffic: Traffic, num_devices: int, *, bandwidth: float, hop_seconds: float
) -> float:
    """Returns the time of an update's collectives, one after the other.

    Args:
      traffic: What they hold.
      num_devices: `N`.
      bandwidth: Bytes per second that a device can send.
      hop_seconds: Delay of one message; a gather takes `log2 N` of them, a sum twice as
        many, as along trees.
    """
    hops = 5 * math.ceil(math.log2(num_devices))
    return sent_bytes(traffic, num_devices) / bandwidth + hops * hop_seconds


def steps_per_update(config: config_lib.Config) -> float:
    """Returns the agent steps played for each update: targets over replay ratio."""
    return config.learner.batch_size / config.pretrain.samples_per_step


def device_bytes(
    config: config_lib.Config, *, num_actions: int, num_devices: int
) -> tuple[float, float]:
    """Returns the bytes of one of `N` devices for its replay, and for the agent.

    Of the parameters there are the learned ones, two moments of Adam and a gradient, and
    a target of the successor network, here counted as all. Activations come on top.
    """
    ring = resources.replay_bytes(config, is_pretraining=True) / num_devices
    return ring, 5 * _FLOAT * num_parameters(config.learner, num_actions)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a device and its share of a host and a network can do."""

    targets_per_second: float  # from which one device learns
    steps_per_core: float  # agent steps per second of emulators on one core
    cores: float  # of the host for each device
    devices_per_host: int
    link: float  # bytes per second a device sends to others of its host
    network: float  # bytes per second a device sends to other hosts
    transfer: float  # bytes per second between host and device
    hop_seconds: float
    least_targets: int  # with fewer per device an update is no faster

    def bandwidth(self, num_devices: int) -> float:
        """Returns that of the slowest link between so many devices."""
        return self.link if num_devices <= self.devices_per_host else self.network


class Run(NamedTuple):
    """Costs of one run: pretraining, fine-tuning, evaluations."""

    pretrain_hours: float
    finetune_hours: float
    evaluate_hours: float  # at most: games that last as long as they may
    core_hours: float  # of emulation, evaluations included

    @property
    def device_hours(self) -> float:
        """Hours for which the run holds its device."""
        return self.pretrain_hours + self.finetune_hours + self.evaluate_hours


def run_cost(config: config_lib.Config, machine: Machine) -> Run:
    """Returns what a run on one device costs.

    While pretraining, device and emulators work at the same time, and the slower one
    counts. Fine-tuning's updates are taken to last as long as pretraining's, which do
    more, and its emulators to be waited for. Evaluations wait for emulators alone.
    """
    pretrain, finetune = config.pretrain, config.finetune
    evaluation = config.evaluation
    steps_per_second = machine.cores * machine.steps_per_core
    played = pretrain.pretrain_agent_steps
    learned = max(0, played - pretrain.warmup_agent_steps)
    updates = learned / steps_per_update(config)
    tuned = finetune.finetune_agent_steps
    tuned_updates = (
        (tuned - finetune.infer_agent_steps)
        * finetune.finetune_samples_per_step
        / config.learner.batch_size
    )
    shown = (
        (evaluation.evaluations + len(evaluation.set_agent_steps))
        * evaluation.eval_episodes
        * config.environment.max_frames
        // FRAME_SKIP
    )
    rate = machine.targets_per_second / config.learner.batch_size
    # One emulator keeps one core busy at most.
    few_steps_per_second = machine.steps_per_core * min(
        machine.cores, finetune.finetune_num_envs
    )
    return Run(
        pretrain_hours=max(updates / rate, played / steps_per_second) / 3600,
        finetune_hours=(tuned_updates / rate + tuned / few_steps_per_second) / 3600,
        evaluate_hours=shown / steps_per_second / 3600,
        core_hours=(played + tuned + shown) / machine.steps_per_core / 3600,
    )


class Limits(NamedTuple):
    """Updates per second that each resource allows one run on N devices."""

    device: float
    emulators: float
    network: float
    transfer: float
    windows: float  # 0 where there are fewer windows than devices, else no limit

    @property
    def first(self) -> str:
        """The resource that runs out first."""
        return min(self._fields, key=lambda name: getattr(self, name))

    @property
    def together(self) -> float:
        """Updates per second: the network's time adds to the device's, no other's does."""
        if self.windows == 0.0:
            return 0.0
        learning = 1 / (1 / self.device + 1 / self.network)
        return min(learning, self.emulators, self.transfer)


def limits(
    config: config_lib.Config, machine: Machine, num_devices: int, *, num_actions: int
) -> Limits:
    """Finds what bounds a run on `N` devices whose batch is that of the config.

    Every device has the same share of the batch, and its time is in proportion to it,
    down to `machine.least_targets`.
    """
    learner = config.learner
    base = steps_per_update(config)
    targets = max(learner.batch_size / num_devices, machine.least_targets)
    network = math.inf
    if num_devices > 1:
        traffic = update_traffic(
            learner, num_actions=num_actions, num_devices=num_devices
        )
        network = 1 / network_seconds(
            traffic,
            num_devices,
            bandwidth=machine.bandwidth(num_devices),
            hop_seconds=machine.hop_seconds,
        )
    return Limits(
        device=machine.targets_per_second / targets,
        emulators=num_devices * machine.cores * machine.steps_per_core / base,
        network=network,
        transfer=num_devices * machine.transfer / (base * _TRANSFER_BYTES),
        windows=math.inf if num_devices <= learner.num_windows else 0.0,
    )


def times_batch(config: config_lib.Config, count: int) -> config_lib.Config:
    """Returns a config with `count` times the targets and particles of an update."""
    return config_lib.replace_options(
        config,
        batch_size=count * config.learner.batch_size,
        num_particles=count * config.learner.num_particles,
    )
