"""The main job on real Pong, killed and resumed: all but the games goes on."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

from faults import harness

from aps_jax.train import stages

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

OPTIONS = (
    "--game=Pong", "--preset=smoke", "--checkpoint_agent_steps=100",
    "--finetune_agent_steps=400", "--infer_agent_steps=200",
)  # fmt: skip


def start(workdir):
    return subprocess.Popen(
        [
            *(sys.executable, "-W", "ignore", "-m", "experiments.run_aps"),
            *(*OPTIONS, f"--workdir={workdir}"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def num_rows(workdir):
    return sum(
        len(harness.read_rows(workdir / stage)[1:])
        for stage in ("pretrain", "pretrained")
    )


def test_the_main_job_goes_on_after_kills_and_a_request(tmp_path):
    rng = random.Random(0)
    workdir = tmp_path / "run"
    # Four rows while pretraining and then inference, evaluation and learning.
    for target, number in ((2, 9), (4, signal.SIGTERM), (5, 9), (6, 9)):
        with start(workdir) as process:
            while process.poll() is None and num_rows(workdir) < target:
                time.sleep(0.001)
            time.sleep(0.1 * rng.random())
            process.send_signal(number)
            said = process.communicate()[0]
            assert process.returncode == (75 if number == signal.SIGTERM else -9), said
        print(f"signal {number} at row {target}", flush=True)
        if harness.steps(workdir / "pretrain"):
            stages.load_pretrained(workdir)
    with start(workdir) as process:
        said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "new games begin" in said
    rows = {
        stage: [int(row[0]) for row in harness.read_rows(workdir / stage)[1:]]
        for stage in ("pretrain", "pretrained")
    }
    # Every 100 agent steps, and the two evaluations, once each.
    assert rows["pretrain"] == [100, 200, 300, 400]
    assert rows["pretrained"] == [100, 200, 200, 300, 400]
    result = json.loads((workdir / "result.json").read_text())
    # (400 - 120) and (400 - 200) steps, half a sample each, 8 samples an update.
    pretrained = json.loads((workdir / "pretrain" / "result.json").read_text())
    assert pretrained["updates"] == 17
    assert result["updates"] == 12
    assert result["finetune_agent_steps"] == 400
    trained = stages.load_finetuned(workdir)
    assert int(trained.state.num_updates) == 12
