"""Put prompts into batches, and divide the batches among processes."""

from collections.abc import Collection, Sequence

from accelerate import PartialState

from glm_peft.prediction.generation_settings import GenerationSettings


def plan_batches(
    lengths: Sequence[int], settings: GenerationSettings, known_rows: Collection[int] = ()
) -> list[list[int]]:
    """
    Put row numbers into batches, the longest prompts first, so that what does not fit into memory shows at once.

    Args:
        lengths: of the prompts, in tokens.
        known_rows: rows that have their answers already.
    """
    # Which rows share a batch decides the draws: where answers are drawn, only batches known in full are left out.
    rows = [row for row in range(len(lengths)) if settings.do_sample or row not in known_rows]
    batches: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -lengths[row]):
        if batches and _has_room(len(batches[-1]), lengths[batches[-1][0]], settings):
            batches[-1].append(row)
        else:
            batches.append([row])
    return [batch for batch in batches if not all(row in known_rows for row in batch)]


def own_share(batches: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """
    Return this process's batches, and a batch to answer again where other processes have one more.

    Processes that hold shards of one model (FSDP) must all generate equally often, or they wait for ever.
    """
    state = PartialState()
    # One by one in turn, as batches get shorter: every process has as much to do.
    own = batches[state.process_index :: state.num_processes]
    most = len(batches[:: state.num_processes])
    return own, batches[: most - len(own)]


def batch_tokens(rows: int, prompt_length: int, settings: GenerationSettings) -> int:
    """Return the tokens that a batch has in the end, given its rows and the length of its longest prompt."""
    # The longest prompt counts for all rows, which are padded to it, and each beam has a cache of its own.
    return rows * settings.num_beams * (prompt_length + settings.max_new_tokens)


def _has_room(rows: int, longest: int, settings: GenerationSettings) -> bool:
    if settings.max_batch_tokens is None:
        return rows < settings.batch_size
    return batch_tokens(rows + 1, longest, settings) <= settings.max_batch_tokens
