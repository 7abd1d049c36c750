r"""Prints what a study costs, and which resource runs out first as it grows.

  python -m experiments.cost --num_games=57 --seeds=5 --updates_per_second=50,100,200
  python -m experiments.cost --benchmark=runs/bench/benchmark.json --cores_per_device=12

Each figure says where it comes from: measured (read from a benchmark), data sheet, assumed,
or calculated from the others by a formula of experiments/cost_model.py. Every option of a
run counts (`--preset` is gpu unless given). docs/scaling.md shows the tables and explains
them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from aps_jax import config as config_lib
from aps_jax import report_tables
from aps_jax.config import FRAME_SKIP
from experiments import common_flags, cost_model

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_NUM_ACTIONS = 18  # of the games that use all; Pong has 6
_DEVICE_COUNTS = (8, 64, 512)
_RAW = ("acting", "acting loop / raw EnvPool")  # the limit is the emulators alone


def _input(default: Any, help_text: str, kind: str, text: str = "{:,g}") -> Any:
    metadata = {"help": help_text, "kind": kind, "text": text}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What goes into the tables besides a config."""

    num_games: int = _input(57, "Games of the study.", "given")
    num_seeds: int = _input(5, "Seeds of each game.", "given")
    cores_per_device: float = _input(
        16.0, "Cores of the host for each device.", "assumed"
    )
    devices_per_host: int = _input(8, "Devices of a host.", "assumed")
    peak_teraflops: float = _input(
        989.0,
        "Peak of a device in 1e12 operations per second (bfloat16, dense; an H100 SXM).",
        "data sheet",
    )
    device_gigabytes: float = _input(
        80.0, "Memory of a device in 1e9 bytes (an H100).", "data sheet"
    )
    link_gigabytes: float = _input(
        450.0,
        "1e9 bytes per second that a device sends to others of its host (NVLink 4).",
        "data sheet",
    )
    network_gigabytes: float = _input(
        12.5,
        "1e9 bytes per second that a device sends to other hosts (100 Gbit/s each).",
        "assumed",
    )
    transfer_gigabytes: float = _input(
        25.0, "1e9 bytes per second between host and device.", "assumed"
    )
    hop_microseconds: float = _input(
        10.0, "Delay of one message between devices, in microseconds.", "assumed"
    )
    least_targets: int = _input(
        64, "Targets per device under which an update is no faster.", "assumed"
    )


def _define_input(field: dataclasses.Field) -> flags.FlagHolder:
    define = flags.DEFINE_integer if field.type is int else flags.DEFINE_float
    return define(field.name, field.default, field.metadata["help"])


# The seeds are those of `--seeds`.
_INPUTS = {
    field.name: _define_input(field)
    for field in dataclasses.fields(Inputs)
    if field.name != "num_seeds"
}
_UPDATES = flags.DEFINE_list(
    "updates_per_second",
    ["50", "100", "200", "400", "800"],
    "Updates per second of one device at the config's batch: a rate of yours, or several "
    "to compare. No GPU has been measured.",
)
_ENV_RATE = flags.DEFINE_float(
    "env_rate_per_core",
    None,
    "Agent steps per second of the emulators on one core; read from --benchmark if not "
    "given.",
    lower_bound=1.0,
)
_BENCHMARK = flags.DEFINE_string(
    "benchmark",
    str(_ROOT / "results/benchmark_cpu/benchmark.json"),
    "What experiments.benchmark wrote, with the row acting.",
)


def read_env_rate(path: pathlib.Path) -> tuple[float, str]:
    """Reads the emulators' rate per core, and says what it was measured on.

    Raises:
      ValueError: The file is no benchmark with that row.
    """
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
        machine = measured["machine"]
        (rate,) = (
            row["limit"]
            for row in measured["rows"]
            if (row["row"], row["case"]) == _RAW
        )
        cores = machine["cores"]
        source = (
            f"{rate:,.0f} agent steps/s on {cores} cores of {machine['cpu']}, "
            f"{machine['utc']} UTC, commit {machine['commit'][:12]}"
        )
        return rate / cores, source
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no benchmark with the row {_RAW[0]}: make one by "
            "python -m experiments.benchmark --rows=acting, or give "
            "--env_rate_per_core."
        ) from error


def make_tables(
    config: config_lib.Config,
    inputs: Inputs,
    *,
    updates_per_second: Sequence[float],
    env_rate: float,
    env_source: str,
) -> list[report_tables.Table]:
    """Makes all tables.

    Args:
      config: The run.
      inputs: What is assumed of the machines.
      updates_per_second: Rates of one device to compare; the middle one counts where
        one is needed.
      env_rate: Agent steps per second of the emulators on one core.
      env_source: Where that comes from, in words.
    """

    def machine(rate: float) -> cost_model.Machine:
        return cost_model.Machine(
            targets_per_second=rate * config.learner.batch_size,
            steps_per_core=env_rate,
            cores=inputs.cores_per_device,
            devices_per_host=inputs.devices_per_host,
            link=1e9 * inputs.link_gigabytes,
            network=1e9 * inputs.network_gigabytes,
            transfer=1e9 * inputs.transfer_gigabytes,
            hop_seconds=1e-6 * inputs.hop_microseconds,
            least_targets=inputs.least_targets,
        )

    middle = sorted(updates_per_second)[len(updates_per_second) // 2]
    bound = (
        1e12
        * inputs.peak_teraflops
        / cost_model.update_flops(config.learner, _NUM_ACTIONS)
    )
    return [
        _inputs_table(config, inputs, env_rate, env_source),
        _update_table(config, inputs, bound),
        _study_table(
            config,
            inputs,
            [
                *(
                    (f"{rate:,g} (assumed)", machine(rate))
                    for rate in updates_per_second
                ),
                (f"{bound:,.0f} (upper bound)", machine(bound)),
            ],
        ),
        _network_table(config, machine(middle)),
        _limits_table(config, inputs, machine(middle), middle),
    ]


def _inputs_table(
    config: config_lib.Config, inputs: Inputs, env_rate: float, env_source: str
) -> report_tables.Table:
    rows = [
        (
            "Agent steps per second of the emulators on one core",
            f"{env_rate:,.0f}",
            env_source,
        )
    ]
    for field in dataclasses.fields(inputs):
        meta = field.metadata
        value = meta["text"].format(getattr(inputs, field.name))
        source = meta["kind"]
        if source != "given":
            source += f" (`--{field.name}`)"
        rows.append((meta["help"].rstrip("."), value, source))
    return report_tables.Table(
        f"What is put in ({config.preset} preset)",
        ("quantity", "value", "where from"),
        tuple(rows),
        (),
    )


def _update_table(
    config: config_lib.Config, inputs: Inputs, bound: float
) -> report_tables.Table:
    learner = config.learner
    ring, agent = cost_model.device_bytes(
        config, num_actions=_NUM_ACTIONS, num_devices=1
    )
    steps = cost_model.steps_per_update(config)
    gigabytes = 1e9 * inputs.device_gigabytes
    rows = (
        (
            "agent steps played per update",
            f"{steps:,g}",
            (
                f"{learner.batch_size:,} targets / "
                f"{config.pretrain.samples_per_step:g} per step"
            ),
        ),
        (
            "updates of the whole pretraining",
            f"{_num_updates(config):,.0f}",
            "(steps - warm-up) / steps per update",
        ),
        (
            f"parameters G (game of {_NUM_ACTIONS} actions)",
            f"{cost_model.num_parameters(learner, _NUM_ACTIONS):,}",
            "sum over layers",
        ),
        (
            "operations of an update",
            f"{cost_model.update_flops(learner, _NUM_ACTIONS) / 1e9:,.0f}e9",
            "2 per weight and place, 3 times that with gradient",
        ),
        (
            "updates per second, upper bound",
            f"{bound:,.0f}",
            "peak / operations; what none will reach",
        ),
        (
            "replay, all of it on one device",
            f"{ring / 1e9:.2f}e9 bytes ({ring / gigabytes:.0%} of its memory)",
            f"{config.pretrain.replay_size:,} steps, frames and all",
        ),
        (
            "parameters, target, Adam's moments, gradient",
            f"{agent / 1e9:.3f}e9 bytes",
            "5 x 4 bytes x G; activations come on top",
        ),
    )
    return report_tables.Table(
        f"One update and one device ({config.preset} preset), calculated",
        ("quantity", "value", "formula"),
        rows,
        (),
    )


def _num_updates(config: config_lib.Config) -> float:
    played = config.pretrain.pretrain_agent_steps - config.pretrain.warmup_agent_steps
    return max(0, played) / cost_model.steps_per_update(config)


def _study_table(
    config: config_lib.Config,
    inputs: Inputs,
    machines: Sequence[tuple[str, cost_model.Machine]],
) -> report_tables.Table:
    num_runs = inputs.num_games * inputs.num_seeds
    rows = []
    for label, machine in machines:
        run = cost_model.run_cost(config, machine)
        rate = machine.targets_per_second / config.pretrain.samples_per_step
        is_bound = rate > machine.cores * machine.steps_per_core
        rows.append(
            (
                label,
                f"{FRAME_SKIP * rate:,.0f}",
                f"{rate / machine.steps_per_core:,.1f}",
                f"{run.pretrain_hours:,.2f}{'*' if is_bound else ''}",
                f"{run.finetune_hours:,.3f}",
                f"{run.evaluate_hours:,.2f}",
                f"{num_runs * run.device_hours:,.0f}",
                f"{num_runs * run.core_hours:,.0f}",
            )
        )
    frames = config.pretrain.pretrain_frames
    return report_tables.Table(
        f"{inputs.num_games} games x {inputs.num_seeds} seeds x {frames:,} frames, "
        "calculated",
        (
            "updates/s of a device",
            "frames/s it can learn from",
            "cores it needs",
            "hours of pretraining",
            "of fine-tuning",
            "of evaluations, at most",
            "device-hours of the study",
            "core-hours of emulation",
        ),
        tuple(rows),
        (
            (
                f"With {inputs.cores_per_device:g} cores per device; *: the emulators are "
                "the slower part, and more cores would help. Acting and compiling are left "
                "out. Evaluations: as if each game "
                f"lasted {config.environment.max_frames:,} frames; most are far shorter."
            ),
        ),
    )


def _network_table(
    config: config_lib.Config, machine: cost_model.Machine
) -> report_tables.Table:
    rows = []
    for count in _DEVICE_COUNTS:
        for words, of_case in _cases(config, count):
            traffic = cost_model.update_traffic(
                of_case.learner, num_actions=_NUM_ACTIONS, num_devices=count
            )
            seconds = [
                cost_model.network_seconds(
                    traffic,
                    count,
                    bandwidth=bandwidth,
                    hop_seconds=machine.hop_seconds,
                )
                for bandwidth in (machine.link, machine.network, 1.25e9)
            ]
            rows.append(
                (
                    f"{count}, {words}",
                    f"{traffic.gathered:,}",
                    f"{traffic.summed_early + traffic.summed:,}",
                    f"{cost_model.sent_bytes(traffic, count):,.0f}",
                    *(f"{1e3 * value:.2f}" for value in seconds),
                )
            )
    return report_tables.Table(
        "Network traffic of an update, calculated",
        (
            "devices, batch",
            "gathered (bytes)",
            "summed (bytes)",
            "sent by each device (bytes)",
            f"ms at {machine.link / 1e9:g}e9 bytes/s",
            f"ms at {machine.network / 1e9:g}e9",
            "ms at 1.25e9",
        ),
        tuple(rows),
        (),
    )


_WORDS = {
    "device": "the devices",
    "emulators": "emulator cores",
    "network": "the network",
    "transfer": "host to device",
    "windows": "windows of the batch",
}


def _limits_table(
    config: config_lib.Config,
    inputs: Inputs,
    machine: cost_model.Machine,
    rate: float,
) -> report_tables.Table:
    rows = []
    for count in (1, *_DEVICE_COUNTS):
        held = cost_model.device_bytes(
            config, num_actions=_NUM_ACTIONS, num_devices=count
        )
        share = sum(held) / (1e9 * inputs.device_gigabytes)
        for words, of_case in _cases(config, count):
            found = cost_model.limits(of_case, machine, count, num_actions=_NUM_ACTIONS)
            hours = "-"
            if found.together:
                hours = f"{_num_updates(of_case) / found.together / 3600:,.3f}"
            rows.append(
                (
                    f"{count}, {words}",
                    f"{of_case.learner.batch_size / count:,g}",
                    f"{share:.1%}",
                    *(
                        "-" if value == float("inf") else f"{value:,.0f}"
                        for value in found[:4]
                    ),
                    _WORDS[found.first],
                    f"{found.together:,.0f}" if found.together else "impossible",
                    hours,
                    f"{_num_updates(of_case):,.0f}",
                )
            )
    return report_tables.Table(
        "One run on N devices: updates per second that each resource allows, calculated",
        (
            "devices, batch",
            "targets of a device",
            "its memory: replay and agent",
            "devices",
            "emulator cores",
            "network",
            "host to device",
            "first to run out",
            "updates/s together",
            "hours of pretraining",
            "updates in all",
        ),
        tuple(rows),
        (
            (
                f"One device alone makes {rate:,g} updates/s (assumed). The network's time "
                "adds to the devices'; the emulators work beside both."
            ),
        ),
    )


def _cases(
    config: config_lib.Config, count: int
) -> list[tuple[str, config_lib.Config]]:
    """Returns the same batch for all devices together, and for each of them."""
    cases = [("same batch", config)]
    if count > 1:
        cases.append(("batch x N", cost_model.times_batch(config, count)))
    return cases


def default_tables() -> list[report_tables.Table]:
    """Makes the tables as the script does without flags."""
    env_rate, source = read_env_rate(pathlib.Path(_ROOT, _BENCHMARK.default))
    return make_tables(
        config_lib.preset_config("gpu"),
        Inputs(),
        updates_per_second=[float(word) for word in _UPDATES.default],
        env_rate=env_rate,
        env_source=f"measured: {source}",
    )


def main(argv: Sequence[str]) -> None:
    """Prints the tables for what the flags say."""
    common_flags.reject_words(argv)
    config = common_flags.config_from_flags()
    try:
        rates = [float(word) for word in _UPDATES.value]
    except ValueError:
        rates = []
    if not rates or not min(rates) > 0.0:
        raise ValueError(
            f"--updates_per_second must be positive numbers, got {_UPDATES.value}."
        )
    values = {name: holder.value for name, holder in _INPUTS.items()}
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"--{name} must be positive, got {value}.")
    seeds = common_flags.seeds_from_flags()
    if seeds is not None:
        values["num_seeds"] = len(seeds)
    if _ENV_RATE.value is None:
        env_rate, source = read_env_rate(pathlib.Path(_BENCHMARK.value))
        source = f"measured: {source}"
    else:
        env_rate, source = _ENV_RATE.value, "given (`--env_rate_per_core`)"
    tables = make_tables(
        config,
        Inputs(**values),
        updates_per_second=rates,
        env_rate=env_rate,
        env_source=source,
    )
    report_tables.show_tables(tables, ())


if __name__ == "__main__":
    flags.FLAGS.set_default("preset", "gpu")
    common_flags.run(main, short=("preset", "seeds"))
