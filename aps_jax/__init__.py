"""APS in JAX: pure losses, rewards and tasks that other agents can import.

These names need neither EnvPool nor flags nor a GPU, and do no work at import. The
modules `aps_jax.losses`, `.rewards`, `.tasks` and `.knn` are those of `aps_jax.ops`.
Stages, environments and agents are imported by their modules' names.
"""

import sys

from aps_jax.networks.modules import (
    FeatureNetwork,
    Features,
    MlpEncoder,
    NatureEncoder,
    PaperEncoder,
    SmallEncoder,
    Successor,
    SuccessorNetwork,
)
from aps_jax.ops import knn, losses, rewards, tasks
from aps_jax.ops.knn import knn_distances
from aps_jax.ops.losses import (
    SplitTDError,
    feature_loss,
    mask_after_cut,
    n_step_cumulant,
    n_step_target,
    off_policy_td_error,
    q_values,
    scalar_td_error,
    split_td_error,
    vector_td_error,
)
from aps_jax.ops.rewards import (
    DistanceScale,
    init_distance_scale,
    intrinsic_reward,
    particle_entropy_reward,
    skill_reward,
    update_distance_scale,
)
from aps_jax.ops.sphere import normalize, sample_uniform, sample_von_mises_fisher
from aps_jax.ops.tasks import (
    InferredTask,
    RegressionMoments,
    candidate_tasks,
    gpi_action_values,
    infer_task,
    init_regression_moments,
    regress_task,
    update_regression_moments,
)
from aps_jax.ops.whitening import Whitening, init_whitening, update_whitening, whiten

# The first public names of these modules, from before they had a room.
for _module in (knn, losses, rewards, tasks):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module

__all__ = (
    "DistanceScale",
    "FeatureNetwork",
    "Features",
    "InferredTask",
    "MlpEncoder",
    "NatureEncoder",
    "PaperEncoder",
    "RegressionMoments",
    "SmallEncoder",
    "SplitTDError",
    "Successor",
    "SuccessorNetwork",
    "Whitening",
    "candidate_tasks",
    "feature_loss",
    "gpi_action_values",
    "infer_task",
    "init_distance_scale",
    "init_regression_moments",
    "init_whitening",
    "intrinsic_reward",
    "knn_distances",
    "mask_after_cut",
    "n_step_cumulant",
    "n_step_target",
    "normalize",
    "off_policy_td_error",
    "particle_entropy_reward",
    "q_values",
    "regress_task",
    "sample_uniform",
    "sample_von_mises_fisher",
    "scalar_td_error",
    "skill_reward",
    "split_td_error",
    "update_distance_scale",
    "update_regression_moments",
    "update_whitening",
    "vector_td_error",
    "whiten",
)
