"""Flags that the scripts share, made from the config's fields; the only reader of them.

Every option of `aps_jax.config.Config` is a flag of the same name. A flag that is not
given takes its value from the preset.
"""

import contextlib
import dataclasses
import logging as python_logging
import os
import pathlib
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from aps_jax import config as config_lib
from aps_jax.envs import games
from aps_jax.parallel import interrupts, processes
from aps_jax.runs import console, folders, machine, progress, tracking
from aps_jax.train import loop, preflight, recorders

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of this run: made, or continued if it is this very run."
)
_PRESET = flags.DEFINE_enum(
    "preset",
    "paper",
    list(config_lib.PRESETS),
    "Values for all options not given: smoke (seconds, learns nothing), cpu (minutes "
    "on two cores, a small encoder), gpu (the paper's quantities, many environments), "
    "paper, minatar or maze for these worlds, or atari100k (100,000 agent steps from "
    "scratch, as the talk's rivals).",
)
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    "auto",
    "Folder in which compiled programs are kept for the next start; auto is the user's "
    "cache folder (JAX_COMPILATION_CACHE_DIR where it is set), empty keeps none.",
)
_REQUIRE_ACCELERATOR = flags.DEFINE_bool(
    "require_accelerator", False, "Stop at once if JAX sees no GPU or TPU."
)
_SHOW_TRACEBACK = flags.DEFINE_bool(
    "showtraceback", False, "Show where in the program an error arose."
)
_SEEDS = flags.DEFINE_list(
    "seeds",
    None,
    "Several seeds: how many, from 0 on, or the seeds themselves, such as 0,1,2.",
)
_NUM_SEEDS = flags.DEFINE_integer(
    "num_seeds",
    None,
    "Pretrain this many seeds at once, from --seed on, on one device and with one pool "
    "of environments for all.",
)
_KNOWN_ARMS = ("pretrained", "scratch")
_ARMS = flags.DEFINE_list(
    "arms",
    None,
    "Fine-tunings to run: pretrained, scratch (an untrained agent with the same "
    "budget), or both with a comma between.",
)

_MAX_MINUTES = flags.DEFINE_float(
    "max_minutes",
    None,
    "Minutes after which the command stops by itself, as at a signal: it saves a "
    "checkpoint, for which time must be left, and ends with code 75. Start and "
    "compilation count. May differ when a run is continued.",
    lower_bound=0.0,
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT of process 0 of a run over several hosts, the same in all of them. On "
    "Slurm a step of several tasks needs none of these three flags.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "Processes of this run, one on each host; 1 leaves the others of a Slurm step "
    "alone.",
    lower_bound=1,
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of the processes this is, from 0 on.", lower_bound=0
)

_PREFLIGHT = flags.DEFINE_bool(
    "preflight",
    False,
    "Only check devices, memory, disk, cores and folder, measure the rate, and say how "
    "many hours the run will take.",
)
_PREFLIGHT_SECONDS = flags.DEFINE_float(
    "preflight_seconds",
    20.0,
    "Seconds for which --preflight measures the rate of each stage.",
    lower_bound=0.1,
)


def define_option(name: str, field: Any) -> flags.FlagHolder:
    """Defines the flag of a config's option; options of one name share one flag.

    Its default is None: each config has its own.
    """
    if name in flags.FLAGS:
        return flags.FlagHolder(flags.FLAGS, flags.FLAGS[name])
    help_text = field.metadata["help"]
    if field.metadata["choices"] is not None:
        return flags.DEFINE_enum(name, None, field.metadata["choices"], help_text)
    define: dict[Any, Callable[..., flags.FlagHolder]] = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    return define[field.type](name, None, help_text)


_OPTIONS = {
    name: define_option(name, field)
    for name, field in config_lib.all_option_fields().items()
    if name != "preset"
}

# What `--helpshort` shows of the flags here; `--helpfull` shows all.
SHORT = (
    *("game", "seed", "agent", "preset", "workdir"),
    *("require_accelerator", "preflight"),
)


def given_options() -> dict[str, Any]:
    """Returns the options that the command line gives, by name."""
    given = {name: holder.value for name, holder in _OPTIONS.items()}
    return {name: value for name, value in given.items() if value is not None}


def config_from_flags(
    base: config_lib.Config | None = None, **changes: Any
) -> config_lib.Config:
    """Builds the config that the flags describe.

    Args:
      base: What the flags change; the preset's config by default.
      **changes: Options that go before the flags.

    Raises:
      ValueError: A value is out of bounds, the game is unknown, the agent or the kind
        of game has not such an option, or `base` and `--preset` are both given.
    """
    given = {**given_options(), **changes}
    if base is not None and _PRESET.present:
        raise ValueError(
            "--preset cannot be given here: the values come from the run in the "
            "folder that is named. Give single options instead."
        )
    if base is None:
        agent = given.get("agent", config_lib.DEFAULT_AGENT)
        base = config_lib.preset_config(_PRESET.value, agent)
    config = config_lib.replace_options(base, **given)
    games.check(config.game)
    of_emulators = given.keys() & {
        field.name for field in dataclasses.fields(config_lib.EnvironmentConfig)
    }
    if games.is_world(config.game) and of_emulators:
        names = ", ".join(f"--{name}" for name in sorted(of_emulators))
        raise ValueError(
            f"{names}: for Atari's emulators alone, {config.game} has none."
        )
    if config.report.wandb:
        tracking.check_wandb()
    if _REQUIRE_ACCELERATOR.value:
        machine.check_accelerator()
    return config


def workdir_from_flags() -> pathlib.Path:
    """Returns the run's folder, which the user must give."""
    if not _WORKDIR.value:
        raise ValueError("--workdir=DIR is needed: the folder of this run.")
    return folders.as_path(_WORKDIR.value)


def seeds_of_runs() -> list[int] | None:
    """Returns the seeds of `--seeds` or `--num_seeds`; None if neither was given."""
    words, num = _SEEDS.value, _NUM_SEEDS.value
    if num is not None:
        if words is not None:
            raise ValueError(
                "--num_seeds pretrains the seeds from --seed on at once, and --seeds "
                "names those of runs one after another: give one of the two."
            )
        if num < 1:
            raise ValueError(f"--num_seeds must be at least 1, got {num}.")
        first = given_options().get("seed", 0)
        return list(range(first, first + num))
    if words is None:
        return None
    if not words or not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"--seeds must be a number, or numbers, got {words}.")
    numbers = list(dict.fromkeys(int(word) for word in words))
    if len(words) > 1:
        return numbers
    if numbers[0] == 0:
        raise ValueError("--seeds=0 asks for no seed: give a number of seeds.")
    return list(range(numbers[0]))


def runs_from_flags(
    config: config_lib.Config, workdir: pathlib.Path
) -> list[recorders.Runs]:
    """Returns the runs that the flags of seeds ask for, one after another.

    Without such a flag it is `config` in `workdir`; else each seed has a folder in it.
    """
    seeds = seeds_of_runs()
    if seeds is None:
        return [recorders.make_runs(config, workdir)]
    if is_at_once() and len(seeds) > 1:
        return [recorders.make_runs(config, workdir, seeds)]
    return [
        recorders.make_runs(
            config_lib.replace_options(config, seed=seed),
            recorders.seed_folder(workdir, seed),
        )
        for seed in seeds
    ]


def is_at_once() -> bool:
    """Returns whether the seeds learn at once."""
    return _NUM_SEEDS.value is not None


def arms_from_flags(config: config_lib.Config, default: Sequence[str]) -> list[str]:
    """Returns those arms of `--arms`, or of `default`, that the agent can have."""
    arms = list(dict.fromkeys(default if _ARMS.value is None else _ARMS.value))
    if not arms or not set(arms) <= set(_KNOWN_ARMS):
        raise ValueError(
            f"--arms must be some of {', '.join(_KNOWN_ARMS)}, got {arms}."
        )
    if config.has_pretraining:
        return arms
    if _ARMS.value is not None and "scratch" not in arms:
        raise ValueError(
            f"Agent {config.agent} learns from reward alone: give --arms=scratch."
        )
    return ["scratch"]


def is_preflight(all_runs: Sequence[recorders.Runs], *stage_names: str) -> bool:
    """Does what `--preflight` asks for; returns whether it was asked for.

    The first of the runs is tried, in these of its stages.
    """
    if not _PREFLIGHT.value:
        return False
    for runs in all_runs:
        for folder, config in runs.configs.items():
            folders.holds_run(folder, {"config": config_lib.to_dict(config)})
    checks = preflight.run_checks(
        all_runs[0], stage_names, seconds=_PREFLIGHT_SECONDS.value
    )
    preflight.print_table(checks)
    failed = [check.name for check in checks if check.verdict == "failed"]
    if failed:
        raise ValueError(f"This machine cannot do the run: {', '.join(failed)}.")
    return True


def reject_words(argv: Sequence[str]) -> None:
    """Raises a `ValueError` for words that are no flags; absl would let them pass."""
    if len(argv) > 1:
        raise ValueError(
            f"Unexpected words {' '.join(argv[1:])!r}: every value needs a flag, such "
            "as --game=Pong."
        )


def use_compilation_cache() -> None:
    """Keeps compiled programs where the flag says, for this and later processes.

    The default folder differs between users, versions of JAX and models of CPU: what is
    compiled for one CPU must not run on another, and home folders are shared.
    """
    folder = _COMPILATION_CACHE.value
    if folder == "auto":
        is_set = os.environ.get("JAX_COMPILATION_CACHE_DIR")
        cache = None if is_set else machine.cache_folder(_note)
        if cache is None:
            return
        folder = str(cache / "xla")
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            _note(f"compiled programs are not kept for the next start: {error}")
            return
    if not folder:
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


# Flags that may differ between the processes of one run.
_OWN = (
    *("coordinator_address", "process_id", "workdir", "compilation_cache"),
    *("showtraceback", "pdb"),
)


def _connect(script: str, *, is_for_several: bool) -> None:
    """Connects this process to the others of a run over several hosts, if any."""
    arguments = processes.distributed_arguments(
        _COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value, os.environ
    )
    if arguments is None:
        return
    if not is_for_several:
        raise ValueError(
            f"{script} runs in one process, and this is one of "
            f"{arguments['num_processes']}: start one task, or give --num_processes=1."
        )
    given = {
        f"--{flag.name}": str(flag.value)
        for module_flags in flags.FLAGS.flags_by_module_dict().values()
        for flag in module_flags
        if flag.present and flag.name not in _OWN
    }
    same = {**given, **folders.versions(), "git_commit": folders.git_commit()}
    processes.connect(arguments, same)
    if processes.is_primary():
        print(f"A run of {processes.describe()}.", file=sys.stderr)
    else:  # What there is to say, process 0 says.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  Until the process ends.


def limits() -> dict[str, Any]:
    """Returns the flags of time that a sweep passes on to its runs, by name."""
    value = _MAX_MINUTES.value
    return {} if value is None else {"max_minutes": value}


@contextlib.contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Listens for requests to stop and shows progress, for as long as a run takes.

    Returns:
      `stop` and `progress`, as the stages take them.
    """
    stream = None if processes.is_primary() else sys.stdout
    with (
        interrupts.StopRequests(
            is_other_stopped=processes.is_other_stopped, max_minutes=_MAX_MINUTES.value
        ) as stop,
        progress.Progress(stream) as shown,
    ):
        yield {"stop": stop, "progress": shown}


def run(
    main: Callable[[Sequence[str]], None],
    *,
    short: Sequence[str] = SHORT,
    is_for_several: bool = False,
) -> None:
    """Runs a script's main; an error of the user's is one line and exit code 2.

    Args:
      main: Takes the words of the command line that are no flags, program name first.
      short: Flags of this module that `--helpshort` shows for the script.
      is_for_several: Whether it can be one of the processes of a run on several hosts.
    """
    console.protect()
    machine.tune_allocator()
    # Orbax reports every file it touches or cannot; a script's own lines are enough.
    logging.set_verbosity(logging.FATAL)
    python_logging.getLogger("jax").setLevel(python_logging.ERROR)
    warnings.filterwarnings("ignore", module="orbax|flashbax|tensorboardX")
    for name in short:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def guarded(argv: Sequence[str]) -> None:
        if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            # A run is the same whatever the user's shell says.
            jax.config.update("jax_enable_x64", False)
            _note("JAX_ENABLE_X64 is ignored: runs compute in 32 bits")
        use_compilation_cache()
        try:
            _connect(pathlib.Path(argv[0]).stem, is_for_several=is_for_several)
            main(argv)
            processes.disconnect()
        except interrupts.Interrupted as error:
            if processes.is_primary():
                interrupts.say(str(error))
            processes.disconnect()
            sys.exit(interrupts.EXIT_CODE)
        except (Exception, KeyboardInterrupt) as error:
            code, text = _explain(error)
            is_single = processes.num_processes() == 1
            # What all processes raise together, the primary says for all.
            is_agreed = (
                is_single
                or isinstance(error, loop.NonFinite)
                or processes.is_agreed(error)
            )
            is_said = processes.is_primary() or not is_agreed
            if text is None or flags.FLAGS.pdb or flags.FLAGS.showtraceback:
                if is_single:
                    raise
                if is_said:
                    traceback.print_exc()
            elif is_said:
                interrupts.say(f"error: {text}")
            if not is_agreed:
                processes.fail(code, text or repr(error))
            processes.disconnect()
            sys.exit(code)

    app.run(guarded)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def warn(text: str) -> None:
    """Prints a warning to standard error."""
    print(f"warning: {text}", file=sys.stderr)


def _explain(error: BaseException) -> tuple[int, str | None]:
    """Returns the exit code of an error, and what to say of it if it is the user's."""
    if lost := processes.lost_process(error):
        return 1, lost
    if isinstance(error, loop.EnvironmentFailure):
        return 1, f"{error}; the same command continues"
    if isinstance(error, ValueError | FloatingPointError | OSError):
        return 2, str(error)
    is_of_memory = "RESOURCE_EXHAUSTED" in str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and is_of_memory:
        return 2, f"out of memory: {str(error).splitlines()[0]}"
    return 1, None
