"""
Inspect a prefix: its sizes and norms, its distance from another one, and what a base does with it.

    python -m glm_peft.inspect_adapter ADAPTER
    python -m glm_peft.inspect_adapter ADAPTER OTHER
    python -m glm_peft.inspect_adapter ADAPTER --base BASE --test_file rows.json --output_dir O
    python -m glm_peft.inspect_adapter ADAPTER --base BASE --keep_file builtin
    python -m glm_peft.inspect_adapter ADAPTER --base BASE --test_file rows.json --prune 8 --output_dir SMALLER

An adapter is PEFT's, in a folder or on the Hub, or a published P-Tuning v2 checkpoint folder.
"""

import json
import logging
import math
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel

from glm_peft.adapters.assembly import OpenedBase, open_base, put_adapter_on
from glm_peft.adapters.base_checks import check_weights
from glm_peft.adapters.other_methods import attach_loss
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.fields import flags_with
from glm_peft.arguments.inspection import InspectArguments, parse_inspect_arguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.data import build_training_features
from glm_peft.errors import UserError
from glm_peft.examination.adapter_report import format_changes, format_layers, format_provenance, format_sizes
from glm_peft.examination.adapter_statistics import Prefix, compare_prefixes, measure_norms, read_prefix
from glm_peft.examination.importance_plot import PLOT_NAME, plot_importance
from glm_peft.examination.prefix_importance import Importance, Row, measure_importance, measure_losses, prune_prefix
from glm_peft.examination.prefix_pruning import write_pruned_adapter
from glm_peft.models.loading import find_generation
from glm_peft.prediction.evaluation import Answering
from glm_peft.preprocessing.split_loading import load_splits
from glm_peft.provenance.recipe import public_name
from glm_peft.provenance.record import describe_base, describe_prompt, read_provenance
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.files import digest_file, make_output_dir, write_atomically
from glm_peft.reporting.log import set_up_logging
from glm_peft.reporting.results import print_section
from glm_peft.training.keeping import KEEP_FOLDER, hear_base, read_general_prompts
from glm_peft.training.kept_log import KEPT_TITLES

INSPECTION_NAME = "inspection.json"

logger = logging.getLogger("glm_peft.inspect_adapter")


@exit_with_user_errors()
def main(argv: list[str] | None = None) -> None:
    """Print the tables, and write the files of `--output_dir`."""
    adapters, arguments = parse_inspect_arguments(argv)
    set_up_logging()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # in a file each of their steps would be a line
    prefixes = [read_prefix(adapter, arguments.base, arguments.chat_format) for adapter in adapters]
    # Before a base is loaded, which may take minutes.
    if arguments.prune and arguments.prune >= prefixes[0].num_virtual_tokens:
        raise UserError(
            f"--prune {arguments.prune} leaves nothing out of the {prefixes[0].num_virtual_tokens} virtual tokens of "
            f"{prefixes[0].source}: give a smaller number."
        )
    folder = make_output_dir(arguments.output_dir) if arguments.output_dir else None
    found = describe_numbers(*prefixes)
    if arguments.test_file:
        found |= Trial(prefixes[0], arguments).run(folder)
    if arguments.keep_file:
        found["kept"] = measure_kept(prefixes[0], arguments, folder)
    # Without NaN, which Python would write, but JSON does not know.
    if folder:
        write_atomically(folder / INSPECTION_NAME, json.dumps(_without_nan(found), indent=2) + "\n")


def describe_numbers(prefix: Prefix, other: Prefix | None = None) -> dict[str, Any]:
    """Print and return the measures that need no base."""
    found: dict[str, Any] = {"adapter": describe_prefix(prefix)}
    if other:
        found |= {"other": describe_prefix(other), "comparison": compare_prefixes(prefix, other)}
        print_section(f"{prefix.source} against {other.source}", format_layers(found["comparison"]))
    return found


def describe_prefix(prefix: Prefix) -> dict[str, Any]:
    """Print and return the sizes and norms of a prefix, and print where it comes from."""
    norms = measure_norms(prefix)
    lines = [format_sizes(prefix), format_provenance(read_provenance(prefix.source), prefix.base)]
    lines += ["", "  Norms of the virtual tokens' keys and values", format_layers(norms)]
    print_section(f"Prefix {prefix.source}", "\n".join(lines))
    sizes = {name: getattr(prefix, name) for name in ("num_virtual_tokens", "num_layers", "width")}
    return {"name": public_name(prefix.source), **sizes, "norms": norms}


def measure_kept(prefix: Prefix, arguments: InspectArguments, folder: Path | None) -> dict[str, float]:
    """Print and return how far the adapter moves the base's answers to general prompts."""
    base = _open_base(prefix, arguments)
    prompts = read_general_prompts(base, arguments.keep_file, arguments.max_keep_samples)
    model = put_adapter_on(base.load_model(), base)
    attach_loss(model)
    with tempfile.TemporaryDirectory() as spare:
        own = (folder or Path(spare)) / KEEP_FOLDER
        answering = Answering(model, base.tokenizer, base.chat_format)
        found = hear_base(prompts, answering, own, arguments.per_device_eval_batch_size, {}).measure()
    lines = [f"  {KEPT_TITLES[name]:<61} {value:.4f}" for name, value in found.items()]
    print_section(f"Kept of the base, on {arguments.keep_file}", "\n".join(lines))
    return found


def _open_base(prefix: Prefix, arguments: InspectArguments, data_args: DataArguments | None = None) -> OpenedBase:
    model_args = ModelArguments(
        model_name_or_path=arguments.base,
        adapter_name_or_path=prefix.source,
        chat_format=arguments.chat_format,
        dtype=arguments.dtype,
    )
    return open_base(model_args, data_args)


class Trial:
    """A base and rows on which the attention to a prefix and the losses with and without it are measured."""

    def __init__(self, prefix: Prefix, arguments: InspectArguments) -> None:
        self.prefix, self.arguments = prefix, arguments
        # As a validation split, whose rows need answers; those of a test split do not.
        data_args = DataArguments(
            validation_file=arguments.test_file,
            max_eval_samples=arguments.max_predict_samples,
            **{name: getattr(arguments, name) for name in _shared_flags(arguments)},
        )
        self.base = _open_base(prefix, arguments, data_args)
        self.rows = self.load_rows()  # before the weights, so that a bad row is told at once
        self.model = self.load_model()

    def load_rows(self) -> list[Row]:
        """Read and encode the rows as training would."""
        data_args = self.base.data_args
        split = load_splits(data_args, ["validation"])["validation"]
        dataset, _ = build_training_features(split, self.base.chat_format, self.base.tokenizer, data_args)
        return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in dataset]

    def load_model(self) -> PreTrainedModel:
        """Load the base, and warn where its weights are not those that the adapter was trained on."""
        model = self.base.load_model()
        # Allowed, as another base may be just what one wants to see.
        check_weights(self.base.adapter.origin, model, is_allowed=True)
        logger.info("Base %s on %s, %s; %d examples", self.arguments.base, model.device, model.dtype, len(self.rows))
        return model

    def run(self, folder: Path | None) -> dict[str, Any]:
        """Print and return the measures; write the picture and the smaller adapter into the folder."""
        batch_size, number = self.arguments.per_device_eval_batch_size, self.arguments.prune
        importance = measure_importance(self.model, self.prefix.weight, self.rows, batch_size)
        shares = [{"%": 100 * share} for share in importance.attention]
        print_section(
            "Attention on the prefix, the mean over heads and answer tokens", format_layers(shares, decimals=1)
        )
        print_section(
            "Loss without each virtual token, in nats per answer token, the one that matters most first",
            format_changes(importance),
        )
        kept = importance.most_important(number) if number else []
        found = {"base": public_name(self.arguments.base), "importance": asdict(importance)}
        if folder:
            logger.info("Picture: %s", plot_importance(importance, folder / PLOT_NAME, kept))
        if kept:
            found["pruned"] = self.prune(importance, kept, folder)
        return found

    def prune(self, importance: Importance, kept: list[int], folder: Path) -> dict[str, Any]:
        """Write the adapter of the virtual tokens that are kept, and return these with its loss."""
        # Measured anew: two tokens that stand in for one another both look useless, so the changes do not add up.
        weight = prune_prefix(self.prefix.weight, kept, self.model.config)
        every = torch.ones(1, len(weight), dtype=torch.bool)
        loss = float(measure_losses(self.model, weight, self.rows, every))
        scores = {"loss": loss, "loss_before_pruning": importance.loss}
        scores["loss_without_prefix"] = importance.loss_without_prefix
        write_pruned_adapter(folder, self.prefix, weight, self.model.config, self.record(kept), scores)
        print_section(
            f"The adapter in {folder}",
            f"  virtual tokens {', '.join(map(str, kept))} of {self.prefix.num_virtual_tokens}\n"
            f"  loss {loss:.4f} with these {len(kept)}, {importance.loss:.4f} with all, "
            f"{importance.loss_without_prefix:.4f} without a prefix",
        )
        return {"kept": kept, **scores}

    def record(self, kept: list[int]) -> dict[str, Any]:
        """Return the record of the pruning: the base, the virtual tokens that are kept, and the rows that decided."""
        file = self.arguments.test_file
        return {
            "base": describe_base(
                self.model.config, find_generation(self.base.model_args), self.base.tokenizer, self.model
            ),
            "chat_format": self.base.chat_format.name,
            "prompt": describe_prompt(self.base.data_args),
            "kept_virtual_tokens": kept,
            "pruned_on": {"file": Path(file).name, "sha256": digest_file(file), "examples": len(self.rows)},
        }


def _shared_flags(arguments: InspectArguments) -> list[str]:
    """Return the flags of reading and encoding rows, which the inspection shares with training."""
    names = {*flags_with(DataArguments, "reads"), *flags_with(DataArguments, "encodes")}
    return [name for name in vars(arguments) if name in names]


def _without_nan(value: Any) -> Any:
    """Return a value with `None` for NaN and infinite numbers, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
