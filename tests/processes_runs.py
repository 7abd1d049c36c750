"""Starts real processes of a run over several hosts; reads what they leave."""

import json
import os
import pathlib
import signal
import socket
import time

import fakes  # noqa: F401  Knows the game that the processes play.
import forks
import jax
import numpy as np

from aps_jax.runs import checkpoints, folders
from aps_jax.train import loop, stages

SECONDS = 300.0  # after which a process is taken for hanging


def _run(*arguments):
    import processes_program  # In the child, where it is imported already.

    processes_program.run(*arguments)


def free_port() -> int:
    """Returns a port that nobody uses."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


class Processes:
    """All processes of one start of a run."""

    def __init__(self, workdir, count, *flags, each=None, num_devices=None, **options):
        """Starts them.

        Args:
          workdir: Folder of the run.
          count: How many; one runs alone, on `num_devices` virtual devices.
          *flags: Of all.
          each: A list of further flags for each.
          num_devices: Of all together; `count` by default.
          **options: Options of the config that differ from the program's.
        """
        num_devices = num_devices or count
        self.logs = [pathlib.Path(f"{workdir}.{index}.log") for index in range(count)]
        # Of an earlier start of the same run.
        self._said = [len(_read(log)) for log in self.logs]
        virtual = num_devices // count
        environment = {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
            f"--xla_force_host_platform_device_count={virtual}"
        }
        address = f"localhost:{free_port()}"
        self._processes = []
        for index in range(count):
            place = [
                f"--coordinator_address={address}",
                f"--num_processes={count}",
                f"--process_id={index}",
            ]
            argv = [
                f"--workdir={workdir}",
                f"--options={json.dumps({'num_devices': num_devices, **options})}",
                *(place if count > 1 else []),
                *flags,
                *(each[index] if each else []),
            ]
            process = forks.server("processes_program").Process(
                target=_run, args=(argv, str(self.logs[index]), environment)
            )
            process.start()
            self._processes.append(process)

    def said(self, index: int) -> str:
        """Returns what a process has said since this start."""
        return _read(self.logs[index])[self._said[index] :]

    def wait_for(self, condition) -> None:
        """Waits until `condition()` is true, while all run."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert all(process.is_alive() for process in self._processes), self._all()
            assert time.monotonic() < deadline, self._all()
            time.sleep(0.01)

    def send(self, index: int, number: signal.Signals) -> None:
        """Sends a signal to one."""
        os.kill(self._processes[index].pid, number)

    def wait_for_end_of(self, index: int, *, within: float) -> None:
        """Waits for the end of one."""
        self._processes[index].join(within)
        assert not self._processes[index].is_alive(), self._all()

    def end(self, *, within: float = SECONDS) -> list[int]:
        """Waits for the end of all; returns their exit codes."""
        deadline = time.monotonic() + within
        try:
            for process in self._processes:
                process.join(max(deadline - time.monotonic(), 0.0))
                assert not process.is_alive(), self._all()
        finally:
            for process in self._processes:
                if process.is_alive():
                    process.kill()
        return [process.exitcode for process in self._processes]

    def finish(self) -> None:
        """Waits until all have ended well."""
        codes = self.end()
        assert set(codes) == {0}, self._all()

    def _all(self) -> str:
        return "\n".join(
            f"--- process {index}\n{self.said(index)}"
            for index in range(len(self._processes))
        )


def _read(path: pathlib.Path) -> str:
    return path.read_text() if path.exists() else ""


STAGES = ("pretrain", "finetune")


def flat(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def learned(workdir):
    """All that was learned, of both stages."""
    return flat(
        (
            stages.load_pretrained(workdir / "pretrain").state,
            stages.load_finetuned(workdir / "finetune").state,
        )
    )


def remembered(workdir):
    """The replay and all else of pretraining that lies with its environments."""
    _, config = folders.read_run(workdir / "pretrain")
    agent = config.make_agent(3, config.observation)
    plan = loop.pretrain_plan(config, agent)

    def init():
        rollout = loop.init_rollout(
            plan.phase.policy,
            agent.init(jax.random.key(0)),
            num_envs=plan.num_envs,
            replay_size=plan.replay_size,
        )
        sums = loop.init_sums(loop.names_of(plan.phase.learner.metrics))
        return {
            "loop": (rollout.actor, rollout.episodes, sums),
            "replay": rollout.replay,
        }

    saved = checkpoints.Checkpointer(workdir / "pretrain" / "checkpoints")
    return flat(saved.restore_newest(jax.eval_shape(init)).items)


def files(workdir):
    """Names of a run's files but for the arrays, which differ in format."""
    return {
        str(path.relative_to(workdir))
        for stage in STAGES
        for path in (workdir / stage).glob("*")
        if not path.name.startswith("events.") and path.name != "processes.json"
    }


def result_of(stage):
    result = json.loads((stage / "result.json").read_text())
    for name in ("wall_seconds", "frames_per_second", "git_commit", "init"):
        result.pop(name, None)
    return result
