"""Check the settings of a run against its rows and its base: epochs, learning rate, length."""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from glm_peft.arguments.methods import METHODS
from glm_peft.arguments.training import TrainArguments
from glm_peft.training.run_log import count_steps

_FORGETFUL = 2  # times the method's learning rate
_MANY_EPOCHS = 50  # of so many the last ones teach a model the rows by heart


def describe_steps(arguments: TrainArguments, rows: int) -> list[str]:
    """
    Return the steps and epochs of a run in one process, and what is odd about them and its learning rate.

    Args:
        arguments: of the run, resolved.
        rows: number of rows that its batches are made of.
    """
    args, method = arguments.training, METHODS[arguments.model.peft_type]
    steps, epochs = count_steps(args, rows)
    examples = args.train_batch_size * args.gradient_accumulation_steps
    is_streamed = arguments.data.streaming
    lines = [
        f"{steps:,} steps of {examples:,} rows: {'a stream' if is_streamed else f'{epochs:,.4g} epochs of {rows:,}'}"
    ]
    if epochs > _MANY_EPOCHS and not is_streamed:
        lines.append(
            f"every row is seen {epochs:,.0f} times, so the model will know the rows by heart and forget the rest; "
            "give --num_train_epochs 10 or fewer"
        )
    if args.eval_strategy == "steps" and args.eval_steps > steps:
        lines.append(f"--eval_steps {args.eval_steps} is beyond the last step, so no evaluation comes before the end")
    if args.get_warmup_steps(steps) >= steps:
        lines.append(f"--warmup_steps {args.warmup_steps:g} leaves no step at the full learning rate")
    if method.is_far(args.learning_rate):
        is_above = args.learning_rate > method.learning_rate
        effect = "it may never settle, and forget what the base can do" if is_above else "it will hardly learn"
        lines.append(
            f"--learning_rate {args.learning_rate:g} is far {'above' if is_above else 'below'} the usual "
            f"{method.learning_rate:g} of --peft_type {arguments.model.peft_type}; {effect}"
        )
    if args.learning_rate > _FORGETFUL * method.learning_rate and not args.keep_file:
        lines.append(
            f"--learning_rate {args.learning_rate:g} without --keep_file: a model forgets most at high rates, and "
            f"nothing here would show it; give --keep_file builtin, and --keep_weight 1 or --learning_rate "
            f"{method.learning_rate:g} where the divergence rises"
        )
    return lines


def check_positions(lengths: Sequence[int], beside: int, config: PreTrainedConfig) -> list[str]:
    """
    Return a remark on rows that are longer than the base was made for, if there are any.

    Args:
        lengths: of the rows, in tokens.
        beside: virtual tokens before each row and tokens of the answer that are to come behind it.
        config: of the base.
    """
    limit = getattr(config, "max_position_embeddings", None) or max(lengths) + beside
    longer = sum(length + beside > limit for length in lengths)
    if not longer:
        return []
    return [
        f"{longer:,} of {len(lengths):,} rows are longer than the {limit:,} tokens that the base was made for, with "
        f"virtual tokens and answers (up to {max(lengths) + beside:,}); lower --max_source_length"
    ]
