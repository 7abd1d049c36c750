r"""Runs games x agents x seeds: prints the commands, runs them here, or on Slurm.

  python -m experiments.sweep --games=atari26 --seeds=5 --agents=aps,visr,dqn \
    --preset=gpu --workdir=runs/sweep --stage=run_aps
  python -m experiments.sweep ... --run=local
  python -m experiments.sweep ... --run=slurm --slurm=partition=gpu,timeout_min=1440

Every other flag of a run is passed on. Each run has the folder
WORKDIR/GAME/AGENT/seed_N, its output is in WORKDIR/logs. The same command goes on: what
is finished is skipped, what was interrupted continues. Ends with one table.
"""

import collections
import contextlib
import dataclasses
import glob
import os
import pathlib
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from aps_jax import agents as agents_lib
from aps_jax import config as config_lib
from aps_jax.envs import games as games_lib
from aps_jax.envs import reward_functions
from aps_jax.parallel import interrupts
from aps_jax.report import by_reward, report, tables
from aps_jax.runs import folders, machine, metrics
from aps_jax.scores import scores
from aps_jax.train import stages
from experiments import common_flags

_GAMES = flags.DEFINE_list(
    "games", ["Pong"], "Games separated by commas, or atari26, or atari57."
)
_AGENTS = flags.DEFINE_list(
    "agents", ["aps"], f"Some of {', '.join(agents_lib.AGENTS)}, separated by commas."
)
_STAGE = flags.DEFINE_enum(
    "stage",
    "run_aps",
    ["run_aps", "pretrain", "finetune", "scratch", "rewards"],
    "What each run does: all of run_aps, or one stage of it. finetune and rewards (the "
    "pretrained agent on those of --reward, without learning) start from the "
    "pretraining of the same sweep; scratch from nothing.",
)
_RUN = flags.DEFINE_enum(
    "run",
    "dry",
    ["dry", "local", "slurm"],
    "dry prints the commands, local runs them on this machine, slurm submits them.",
)
_PROCESSES = flags.DEFINE_integer(
    "processes",
    0,
    "Local processes at a time; 0 is as many as fit cores and memory, one on each GPU "
    "where there are any.",
    lower_bound=0,
)
_SLURM = flags.DEFINE_list(
    "slurm",
    [],
    "Parameters of the submission as submitit names them, such as "
    "partition=gpu,timeout_min=1440,gpus_per_node=1,cpus_per_task=16,mem_gb=64.",
)
_SLURM_CLUSTER = flags.DEFINE_enum(
    "slurm_cluster",
    "slurm",
    ["slurm", "local"],
    "local tries --run=slurm without a cluster, in processes of this machine.",
)
_KEEP = flags.DEFINE_string(
    "keep",
    None,
    "Folder that gets the results and curves of what is finished, and sweep.json: "
    "commands, commit and machine. Checkpoints stay behind.",
)
_SHORT = ("preset", "workdir", "seeds", "arms")
_NOT_PASSED = frozenset({"game", "seed", "agent"})
_KEPT_FILES = (folders.RESULT_NAME, metrics.FILE_NAME)
# A run that Slurm stopped says so by its exit code and is begun again; one that does
# so more often than this is broken.
_MAX_REQUEUES = 100
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: its command, and where it leaves its result."""

    name: str
    command: tuple[str, ...]
    folder: pathlib.Path
    log: pathlib.Path

    @property
    def is_done(self) -> bool:
        """Whether its result is there."""
        return (self.folder / folders.RESULT_NAME).exists()


def main(argv: Sequence[str]) -> None:
    """Prints or runs the sweep that the flags describe."""
    common_flags.reject_words(argv)
    # The sweep itself computes nothing, and must not take the memory of a GPU.
    jax.config.update("jax_platforms", "cpu")
    workdir = common_flags.workdir_from_flags()
    jobs = make_jobs(workdir)
    left = [job for job in jobs if not job.is_done]
    print(f"{len(jobs)} runs, {len(jobs) - len(left)} of them finished.")
    if _RUN.value == "dry":
        for job in left:
            print(shlex.join(job.command))
        print("Nothing was run: give --run=local or --run=slurm.")
        return
    started = time.monotonic()
    failed: dict[Job, int] = {}
    if left:
        (workdir / "logs").mkdir(parents=True, exist_ok=True)
        failed = (_run_local if _RUN.value == "local" else _run_slurm)(left)
    for job, code in failed.items():
        what = f"FAILED with exit code {code}"
        if code == interrupts.EXIT_CODE:
            what = "stopped before its end"
        print(f"{what}: {job.name}, see {job.log}")
    _write_summary(workdir, jobs, time.monotonic() - started)
    if _KEEP.value:
        keep(workdir, folders.as_path(_KEEP.value))
        print(f"Kept in {_KEEP.value}.")
    # Only scores are reported as scores; other rewards have a table of their own.
    reward = common_flags.given_options().get("reward", reward_functions.SCORE)
    is_of_score = reward == reward_functions.SCORE
    has_score = is_of_score and _STAGE.value in ("run_aps", "finetune", "scratch")
    if has_score and any(job.is_done for job in jobs):
        tables.show(report.report([workdir], out=workdir / "report"))
        print(f"Written to {workdir / 'report'}.")
    is_of_rewards = _STAGE.value == "rewards" or not is_of_score
    if is_of_rewards and (table := by_reward.table(workdir)):
        tables.show_tables([table])
    if failed and set(failed.values()) == {interrupts.EXIT_CODE}:
        raise interrupts.Interrupted(
            f"{len(failed)} of {len(jobs)} runs stopped before their end; the same "
            "command continues"
        )
    if failed:
        raise ValueError(f"{len(failed)} of {len(jobs)} runs failed.")


def _write_summary(workdir: pathlib.Path, jobs: Sequence[Job], seconds: float) -> None:
    """Writes `sweep.json`: how the runs of this folder were made, and where."""
    path = workdir / "sweep.json"
    before = folders.read_json(path) if path.exists() else {}
    done = [job.command for job in jobs if job.is_done]
    commands = [shlex.join(("python", *words[1:])) for words in done]
    commits = [folders.git_commit()] if seconds > 1.0 else []
    folders.write_json(
        path,
        {
            "schema": folders.SCHEMA,
            "kind": "aps_jax sweep",
            "commands": list(dict.fromkeys([*before.get("commands", []), *commands])),
            "git_commits": list(
                dict.fromkeys([*before.get("git_commits", []), *commits])
            ),
            "machine": describe_machine(),
            "versions": folders.versions(),
            "wall_seconds": round(before.get("wall_seconds", 0.0) + seconds, 1),
        },
    )


def describe_machine() -> dict[str, Any]:
    """Describes this machine, without naming it."""
    return {
        "cpu": machine.cpu_fact("model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": len(glob.glob("/dev/nvidia[0-9]*")),
        "system": platform.system(),
    }


def keep(workdir: pathlib.Path, to: pathlib.Path) -> None:
    """Copies `sweep.json`, and result and curves of each stage that has both."""
    to.mkdir(parents=True, exist_ok=True)
    shutil.copy(workdir / "sweep.json", to / "sweep.json")
    for result in sorted(workdir.glob(f"*/*/seed_*/*/{folders.RESULT_NAME}")):
        folder = to / result.parent.relative_to(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        for name in _KEPT_FILES:
            if (result.parent / name).exists():
                shutil.copy(result.parent / name, folder / name)


def make_jobs(workdir: pathlib.Path) -> list[Job]:
    """Makes the runs that the flags describe, in the order of games.

    Raises:
      ValueError: A flag is wrong, or a folder holds a run of other values.
    """
    games = _games(_GAMES.value)
    agents = list(dict.fromkeys(_AGENTS.value))
    if not set(agents) <= set(agents_lib.AGENTS):
        raise ValueError(
            f"--agents must be some of {', '.join(agents_lib.AGENTS)}, got {agents}."
        )
    for name in _NOT_PASSED & set(common_flags.given_options()):
        raise ValueError(f"--{name} cannot be given to a sweep: give --{name}s.")
    if common_flags.is_at_once():
        raise ValueError(
            "--num_seeds cannot be given to a sweep, whose runs are processes of their "
            "own: give --seeds."
        )
    seeds = common_flags.seeds_of_runs() or [0]
    return [
        _job(workdir, common_flags.config_from_flags(game=game, agent=agent, seed=seed))
        for game in games
        for agent in agents
        for seed in seeds
    ]


def _job(workdir: pathlib.Path, config: config_lib.Config) -> Job:
    stage = _STAGE.value
    if stage in ("pretrain", "finetune", "rewards") and not config.has_pretraining:
        raise ValueError(
            f"Agent {config.agent} learns from reward alone: it has no --stage={stage}."
        )
    arms = common_flags.arms_from_flags(config, ["pretrained", "scratch"])
    root = workdir / config.game / config.agent / f"seed_{config.seed}"
    # Each reward that is learned has a folder of its own.
    suffix = by_reward.folder_suffix(config.finetune.reward)
    pretrained = folders.STAGE_FOLDERS["finetune"] + suffix
    script, name, words = {
        "run_aps": ("run_aps", "", [f"--arms={','.join(arms)}"]),
        "pretrain": ("pretrain", "pretrain", []),
        "finetune": ("finetune", pretrained, [f"--init={root / 'pretrain'}"]),
        "scratch": ("finetune", f"scratch{suffix}", []),
        "rewards": ("evaluate", "rewards", [f"--checkpoint={root / 'pretrain'}"]),
    }[stage]
    folder = root / name
    passed = common_flags.given_options()
    if stage == "rewards":
        passed.setdefault("reward", config.finetune.reward)
    elif stage != "finetune":  # Which takes all this from the pretraining.
        words = [f"--preset={config.preset}", *words]
        passed |= {"game": config.game, "agent": config.agent, "seed": config.seed}
    game = config.game.replace("/", "_")  # Worlds have a slash in their name.
    file = f"{stage}_{game}_{config.agent}_{config.seed}.log"
    job = Job(
        name=f"{stage} {config.game} {config.agent} seed {config.seed}",
        command=(
            *(sys.executable, "-m", f"experiments.{script}", f"--workdir={folder}"),
            *words,
            *(f"--{name}={value}" for name, value in sorted(passed.items())),
            *(f"--{name}={value}" for name, value in common_flags.limits().items()),
        ),
        folder=folder,
        log=workdir / "logs" / file,
    )
    if job.is_done:
        _, found = folders.read_run(folder)
        if stage in ("run_aps", "pretrain", "scratch") and found != config:
            raise ValueError(
                f"{folder} holds a finished run of other values than these flags "
                "give. Give another --workdir, or the flags of the sweep there."
            )
    return job


def _games(words: Sequence[str]) -> list[str]:
    """Reads `--games`."""
    lists = {"atari26": scores.atari26_games, "atari57": scores.atari57_games}
    games: list[str] = []
    for word in words:
        if word in lists:
            games += [scores.camel_case(name) for name in lists[word]()]
        else:
            games.append(word)
    for game in games:
        games_lib.check(game)
    return list(dict.fromkeys(games))


def slots(config: config_lib.Config) -> list[dict[str, Any]]:
    """Returns the `cores`, and the `gpu` if any, of each process at a time."""
    cores = sorted(os.sched_getaffinity(0))
    gpus = len(glob.glob("/dev/nvidia[0-9]*"))
    fitting = gpus
    if not gpus:
        memory = [stages.memory_of(config, is_pretraining=p) for p in (True, False)]
        needed = max(machine.needed_bytes(**of_stage) for of_stage in memory)
        in_memory = int(0.9 * machine.available_bytes()) // needed
        fitting = max(1, min(len(cores), in_memory))
    count = _PROCESSES.value or fitting
    found: list[dict[str, Any]] = []
    for number in range(count):
        share = cores[number * len(cores) // count : (number + 1) * len(cores) // count]
        slot = {"cores": share or [cores[number % len(cores)]]}
        found.append(slot | ({"gpu": number % gpus} if gpus else {}))
    return found


def _run_local(jobs: Sequence[Job]) -> dict[Job, int]:
    """Runs jobs side by side; returns the exit codes of those that failed."""
    free = slots(common_flags.config_from_flags(agent=_AGENTS.value[0]))
    print(f"{len(jobs)} runs to go, {len(free)} at a time.", flush=True)
    waiting = collections.deque(jobs)
    running: dict[subprocess.Popen[bytes], tuple[Job, dict[str, Any]]] = {}
    failed: dict[Job, int] = {}
    with interrupts.StopRequests() as stop:
        try:
            while waiting or running:
                stop.check()
                while waiting and free:
                    job, slot = waiting.popleft(), free.pop(0)
                    running[_start(job, slot)] = (job, slot)
                    print(f"started: {job.name}", flush=True)
                time.sleep(_POLL_SECONDS)
                for process in [one for one in running if one.poll() is not None]:
                    job, slot = running.pop(process)
                    free.append(slot)
                    if process.returncode:
                        failed[job] = process.returncode
                    words = {0: "finished", interrupts.EXIT_CODE: "stopped"}
                    word = words.get(process.returncode, "failed")
                    print(f"{word}: {job.name}", flush=True)
        except interrupts.Interrupted:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
            raise
    return failed


def _start(job: Job, slot: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if "gpu" in slot:
        environment["CUDA_VISIBLE_DEVICES"] = str(slot["gpu"])
    # A process started here inherits these cores, by which EnvPool and XLA size
    # their threads.
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, slot["cores"])
    try:
        with job.log.open("a") as log:
            return subprocess.Popen(
                job.command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
    finally:
        os.sched_setaffinity(0, mine)


class SlurmRun:
    """A job as Slurm runs it; what is stopped before its end is submitted again."""

    def __init__(self, job: Job):
        """Holds the job."""
        self._job = job
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Runs the job, again while it says so; returns its exit code."""
        for _ in range(_MAX_REQUEUES):
            with self._job.log.open("a") as log:
                self._process = subprocess.Popen(
                    self._job.command, stdout=log, stderr=subprocess.STDOUT
                )
            code = self._process.wait()
            if code != interrupts.EXIT_CODE:
                break
        return code

    def checkpoint(self) -> Any:
        """Lets the run save before a time limit; returns what submitit submits again.

        submitit calls it in its signal handler, and ends this process after it.
        """
        import submitit

        if self._process is not None:
            # `Popen.wait` holds a lock, within which this handler runs.
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._process.pid, signal.SIGTERM)
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(SlurmRun(self._job))


def _run_slurm(jobs: Sequence[Job]) -> dict[Job, int]:
    """Submits jobs and waits for them; returns the exit codes of those that failed."""
    try:
        import submitit
    except ImportError as error:
        raise ValueError(
            "--run=slurm needs the package submitit: pip install 'aps_jax[sweep]'."
        ) from error
    folder = jobs[0].log.parent / "submitit"
    executor = submitit.AutoExecutor(folder=folder, cluster=_SLURM_CLUSTER.value)
    executor.update_parameters(name="aps_jax", **dict(_slurm_parameters(_SLURM.value)))
    submitted = [(job, executor.submit(SlurmRun(job))) for job in jobs]
    print(
        f"Submitted {len(jobs)} jobs: {submitted[0][1].job_id} to "
        f"{submitted[-1][1].job_id}. Waiting; the same command looks again.",
        flush=True,
    )
    failed = {}
    for job, handle in submitted:
        try:
            code = handle.result()
        except submitit.core.utils.UncompletedJobError as error:
            print(f"failed: {job.name}: {str(error).splitlines()[0]}")
            code = 1
        if code != 0:
            failed[job] = code
        else:
            print(f"finished: {job.name}")
    return failed


def _slurm_parameters(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Reads `--slurm`."""
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--slurm takes name=value, got {word!r}.")
        yield name, int(value) if value.isdecimal() else value


if __name__ == "__main__":
    common_flags.run(main, short=_SHORT)
