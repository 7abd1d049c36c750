"""A test of learning: pretrained agents beat untrained ones where it is known."""

import functools

import fakes
import numpy as np

from aps_jax import config as config_lib
from aps_jax.train import recorders, stages

# Reward-free play in the four corners, then 160 steps with reward to infer the task and
# 24 to learn it. Seen with seeds 0 and 1: of 10 points, evaluated after inference and
# after 12 and 24 steps, the pretrained agents score 10, 10, 10 and 10, 10, 10; those
# from scratch 0, 10, 10 and 0, 0, 10.
OPTIONS = {
    "game": fakes.PLANES,
    "encoder": "mlp",
    "hidden_units": 32,
    "feature_dim": 4,
    "num_particles": 16,
    "num_neighbors": 2,
    "n_steps": 1,
    "discount": 0.5,
    "task_steps": 5,
    "gpi_tasks": 0,
    "batch_size": 32,
    "target_period": 20,
    "learning_rate": 2e-3,
    "feature_learning_rate": 2e-3,
    "num_envs": 8,
    "replay_size": 4000,
    "warmup_agent_steps": 200,
    "samples_per_step": 4.0,
    "pretrain_frames": 4 * 4000,
    "pretrain_epsilon": 0.2,
    "finetune_agent_steps": 184,
    "infer_agent_steps": 160,
    "finetune_num_envs": 8,
    "finetune_samples_per_step": 4.0,
    "finetune_learning_rate": 1e-3,
    "finetune_epsilon": 0.1,
    "eval_episodes": 8,
    "eval_epsilon": 0.0,
    "evaluations": 3,
}
SEEDS = (0, 1)
MAKE_CORNERS = functools.partial(fakes.CornersPool, num_states=4)


def test_pretraining_helps_before_the_reward_was_learned(tmp_path):
    config = config_lib.replace_options(config_lib.Config(), **OPTIONS)
    pretraining = recorders.make_runs(config, tmp_path / "pretrain", SEEDS)
    stages.pretrain_runs(pretraining, constructor=MAKE_CORNERS)
    curves = {}
    for arm, inits in (("pretrained", list(pretraining.configs)), ("scratch", None)):
        runs = recorders.make_runs(config, tmp_path / arm, SEEDS)
        results = stages.finetune_runs(runs, inits, constructor=MAKE_CORNERS)
        curves[arm] = np.array(
            [[e["eval_return_mean"] for e in x["evaluations"]] for x in results]
        )
    pool = MAKE_CORNERS(fakes.PLANES, 1, seeds=[0])
    pretrained, scratch = curves["pretrained"], curves["scratch"]
    # At once, far above random play; then better than scratch with the same budget.
    assert pretrained[:, 0].mean() > 2 * pool.random_return
    assert pretrained[:, :2].mean() > scratch[:, :2].mean() + 3.0
    assert pretrained[:, -1].mean() > 0.9 * pool.optimal_return
