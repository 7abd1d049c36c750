"""Tests of aps_jax.runs.tracking: Weights & Biases if asked for, else never touched."""

import functools
import importlib.machinery
import subprocess
import sys
import types

import fakes
import pytest
from absl import flags
from absl.testing import flagsaver

from aps_jax import config as config_lib
from aps_jax.runs import metrics, tracking
from aps_jax.train import stages
from experiments import common_flags


class FakeWandb(types.ModuleType):
    """Remembers what it is told, as the package `wandb` would."""

    class Error(Exception):
        """What all of W&B's errors are."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.started, self.rows, self.axes, self.num_finished = [], [], {}, 0
        self.has_key = True

    def login(self):
        if not self.has_key:
            raise self.Error("No API key configured.\nUse `wandb login` to log in.")

    def init(self, **values):
        self.started.append(values)
        return self

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, values):
        self.rows.append(values)

    def finish(self):
        self.num_finished += 1


@pytest.fixture
def fake(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def make_config(**options):
    options = {
        "game": fakes.PLANES,
        "encoder": "mlp",
        "pretrain_frames": 4 * 120,
        "replay_size": 240,
        "warmup_agent_steps": 60,
        "report_agent_steps": 40,
        **options,
    }
    return config_lib.replace_options(config_lib.preset_config("smoke"), **options)


pretrain = functools.partial(stages.pretrain, constructor=fakes.PlanesPool)


def test_rows_go_to_wandb_under_the_same_names(fake, tmp_path):
    config = make_config(wandb=True)
    pretrain(config, tmp_path / "p")
    (started,) = fake.started
    assert started["project"] == "aps_jax" and started["resume"] == "allow"
    assert started["name"] == "ChainPlanes aps seed 0 p"
    assert started["config"] == config_lib.to_dict(config)
    written = metrics.read_metrics(tmp_path / "p" / "metrics.csv")
    steps = [row["agent_steps"] for row in fake.rows]
    assert steps == written["agent_steps"] == [40, 80, 120]
    assert fake.axes == {"agent_steps": None, "*": "agent_steps"}
    # What is not known yet is left out, everything else is what the file says.
    assert "loss_td" not in fake.rows[0]
    assert fake.rows[-1]["loss_td"] == written["loss_td"][-1]
    assert fake.num_finished == 1


def test_a_folder_keeps_its_id(fake, tmp_path):
    ids = []
    for folder in ("a", "b", "a"):
        tracking.start_wandb(make_config(), tmp_path / folder)
        ids.append(fake.started[-1]["id"])
    assert ids[0] == ids[2] != ids[1]


def test_unasked_it_is_not_touched(fake, tmp_path):
    pretrain(make_config(), tmp_path / "p")
    assert fake.started == []
    # TensorBoard is.
    assert list((tmp_path / "p").glob("events.out.tfevents.*"))


def test_where_it_is_absent_one_line_says_so_before_anything_else(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with flagsaver.flagsaver():
        flags.FLAGS(["test", "--wandb", "--preset=smoke"])
        with pytest.raises(ValueError, match=r"pip install 'aps_jax\[wandb\]'"):
            common_flags.config_from_flags()


def test_without_a_key_one_line_says_so_before_anything_else(fake):
    fake.has_key = False
    with flagsaver.flagsaver():
        flags.FLAGS(["test", "--wandb", "--preset=smoke"])
        with pytest.raises(ValueError, match="WANDB_API_KEY") as caught:
            common_flags.config_from_flags()
    assert "No API key configured." in str(caught.value)
    assert "\n" not in str(caught.value)
    assert fake.started == []


def test_no_import_of_it_without_need():
    program = "import sys; from aps_jax.train import stages; "
    program += "assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
