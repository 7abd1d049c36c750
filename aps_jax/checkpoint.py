"""Checkpoints: saved whole by Orbax, compared before they are restored.

No pickle anywhere: arrays and JSON alone, so that a stranger's checkpoint cannot run
code.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

FORMAT = 1

_KEPT = 2  # Newest checkpoints that stay on disk.


class Checkpointer:
    """Saves and restores the state of one stage in one folder.

    A checkpoint has three parts: `agent`, what is learned and what a later stage takes
    over; `loop`, what the loop carries besides; `facts`, plain JSON values.
    """

    def __init__(self, folder: pathlib.Path):
        """Opens a folder, which is created by the first save.

        Raises:
          ValueError: The path exists and is no folder.
        """
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, not a folder of checkpoints.")
        self._folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, create=True)
        # Named handlers let a fresh process read what another one wrote.
        handlers = {
            "agent": ocp.StandardCheckpointHandler(),
            "loop": ocp.StandardCheckpointHandler(),
            "facts": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, item_handlers=handlers
        )

    def latest(self) -> int | None:
        """Returns the number of the newest whole checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, number: int, agent: Any, loop: Any, facts: dict[str, Any]) -> None:
        """Begins to save; training may go on, the arrays are copied first."""
        self._manager.save(
            number,
            args=ocp.args.Composite(
                agent=ocp.args.StandardSave(agent),
                loop=ocp.args.StandardSave(loop),
                facts=ocp.args.JsonSave({"format": FORMAT, **facts}),
            ),
            force=True,
        )

    def restore_facts(self, number: int) -> dict[str, Any]:
        """Returns the plain values of a checkpoint.

        Raises:
          ValueError: It was written in another format.
        """
        args = ocp.args.Composite(facts=ocp.args.JsonRestore())
        facts = dict(self._manager.restore(number, args=args)["facts"])
        if facts.get("format") != FORMAT:
            raise ValueError(
                f"Checkpoint {self._folder / str(number)} has format "
                f"{facts.get('format')}, this version reads {FORMAT}."
            )
        return facts

    def restore(self, number: int, part: str, template: Any) -> Any:
        """Returns one part of a checkpoint, on the default device.

        Args:
          number: Which checkpoint.
          part: `agent` or `loop`.
          template: A pytree of arrays or `jax.ShapeDtypeStruct`s of the same structure.

        Raises:
          ValueError: Structure, shapes or dtypes differ; the message shows both sides.
        """
        saved = self._manager.item_metadata(number)[part]
        if saved is None:
            raise ValueError(
                f"Checkpoint {self._folder / str(number)} has no part {part!r}."
            )
        differences = tree_differences(saved.tree, template)
        if differences:
            raise ValueError(
                f"Checkpoint {self._folder / str(number)} does not fit: "
                + "; ".join(differences)
            )
        args = ocp.args.Composite(**{part: ocp.args.StandardRestore(template)})
        return self._manager.restore(number, args=args)[part]

    def close(self) -> None:
        """Waits for a save under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def tree_differences(saved: Any, wanted: Any, *, most: int = 6) -> list[str]:
    """Says in words where the arrays of two pytrees differ.

    Args:
      saved: Pytree of leaves with `shape` and `dtype`, as found on disk.
      wanted: The same for what the program expects.
      most: How many differences are told; the rest are counted.

    Returns:
      A sentence per difference, none if structure, shapes and dtypes are the same.
    """
    left, right = _leaves_by_path(saved), _leaves_by_path(wanted)
    found = []
    for path in sorted(set(left) | set(right)):
        if left.get(path) != right.get(path):
            found.append(
                f"{path} is {left.get(path, 'absent')} on disk and "
                f"{right.get(path, 'absent')} here"
            )
    if len(found) > most:
        found = [*found[:most], f"and {len(found) - most} more differences"]
    return found


def _leaves_by_path(tree: Any) -> dict[str, str]:
    # Orbax stores NamedTuples by field name and tuples by index, so the paths are
    # compared as plain words.
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: hasattr(x, "shape")
    )
    return {
        "/".join(_key_name(key) for key in path): (
            f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}"
        )
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def _key_name(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
