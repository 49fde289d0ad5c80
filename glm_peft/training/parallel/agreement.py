"""Check that all processes of a run found the same before they go on together."""

from accelerate import PartialState
from accelerate.utils import gather_object

from glm_peft.errors import UserError


def agree_on_step(step: int | None) -> None:
    """
    Compare the step that each process would resume from; must be called in all of them.

    Args:
        step: of this process's checkpoint; `None` where it found none.

    Raises:
        UserError: the steps differ; raised in all processes, so that none waits for the others.
    """
    # On machines without a common folder one process may find no checkpoint, start from the beginning, and wait for
    # collectives that the others never reach.
    steps = gather_object([step]) if PartialState().num_processes > 1 else [step]
    other = next((rank for rank, value in enumerate(steps) if value != steps[0]), None)
    if other is None:
        return
    raise UserError(
        f"--resume_from_checkpoint: process 0 found {_name(steps[0])} and process {other} {_name(steps[other])}, but "
        "all must go on from the same step: copy that checkpoint to the same place on each machine, or share the "
        "folder among them (--save_on_each_node true writes one on each)."
    )


def _name(step: int | None) -> str:
    return "no complete checkpoint" if step is None else f"step {step}"
