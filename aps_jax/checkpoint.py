"""Checkpoints: saved whole by Orbax, compared before they are restored.

No pickle anywhere: arrays and JSON alone, so that a stranger's checkpoint cannot run
code.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

FORMAT = 1

_KEPT = 2  # Newest checkpoints that stay on disk.


class _MisfitError(ValueError):
    """A checkpoint is whole, and not what the program expects."""


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

    def restore_newest(
        self, templates: dict[str, Any], *, set_damaged_aside: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Restores the newest checkpoint that can be read.

        Damaged ones are passed over with a warning that names them.

        Args:
          templates: What to restore: part (`agent`, `loop`) to a pytree of arrays or
            `jax.ShapeDtypeStruct`s of the same structure.
          set_damaged_aside: Whether to rename damaged ones, so that their numbers are
            free for a run that passes them again.

        Returns:
          The facts and the parts, on the default device; None if there is nothing.

        Raises:
          ValueError: Structure, shapes, dtypes or the format differ (the message shows
            both sides), or there are checkpoints and none of them can be read.
        """
        numbers = sorted(self._manager.all_steps(), reverse=True)
        damaged: list[pathlib.Path] = []
        found = None
        for number in numbers:
            try:
                found = self._restore(number, templates)
                break
            except _MisfitError:
                raise
            # Orbax and TensorStore raise errors of many types for damaged files.
            except Exception as error:  # noqa: BLE001
                path = self._folder / str(number)
                logging.warning(
                    "%s cannot be read (%s); falling back to the one before.",
                    path,
                    str(error).splitlines()[0] if str(error) else type(error).__name__,
                )
                damaged.append(path)
        if numbers and found is None:
            raise ValueError(f"None of the checkpoints in {self._folder} can be read.")
        if set_damaged_aside:
            for path in damaged:
                path.rename(self._folder.parent / f"damaged_checkpoint_{path.name}")
            if damaged:
                self._manager.reload()
        return found

    def _restore(
        self, number: int, templates: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        path = self._folder / str(number)
        args = ocp.args.Composite(facts=ocp.args.JsonRestore())
        facts = dict(self._manager.restore(number, args=args)["facts"])
        if facts.get("format") != FORMAT:
            raise _MisfitError(
                f"Checkpoint {path} has format {facts.get('format')}, this version "
                f"reads {FORMAT}."
            )
        metadata = self._manager.item_metadata(number)
        for part, template in templates.items():
            differences = tree_differences(metadata[part].tree, template)
            if differences:
                raise _MisfitError(
                    f"Checkpoint {path} does not fit: {'; '.join(differences)}"
                )
        args = ocp.args.Composite(
            **{
                part: ocp.args.StandardRestore(template)
                for part, template in templates.items()
            }
        )
        restored = self._manager.restore(number, args=args)
        return facts, {part: restored[part] for part in templates}

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
