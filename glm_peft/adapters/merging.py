"""Merge an adapter that sits inside the base's layers into their weights: a model's folder that needs no PEFT."""

import logging
import warnings

import torch
from torch import nn
from transformers import PreTrainedModel

from glm_peft.adapters.files import read_adapter_config
from glm_peft.adapters.loading import load_adapter
from glm_peft.arguments.fields import changed
from glm_peft.arguments.methods import MERGED
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.models.loading import load_base_model, load_config, load_tokenizer
from glm_peft.reporting.files import make_output_dir

logger = logging.getLogger("glm_peft.adapters.merging")


def merge_adapter(adapter: str, model_args: ModelArguments, output_dir: str) -> None:
    """
    Write a folder with the base, the adapter merged into its weights in their own precision, and the tokenizer.

    Args:
        model_args: which base, and its chat format.
        output_dir: where the merged model goes.

    Raises:
        UserError: the adapter has no place in the base's weights, cannot be read, or is another base's.
    """
    kind = read_adapter_config(adapter).peft_type.value.lower()
    if kind not in MERGED:
        raise UserError(
            f"{adapter} is a {kind} adapter, which has no place in the weights of a base: merge one of "
            f"{', '.join(MERGED)}, or use it as it is."
        )
    # Added in float32 whatever precision the sum is kept in: in bfloat16 a small product would be rounded off first.
    values = changed(model_args, dtype="float32", adapter_name_or_path=adapter)
    model = load_base_model(values, "cpu")  # in float32 it may not fit a GPU
    if model.config.tie_word_embeddings:
        give_head_weights(model)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Model (with|has) `tie_word_embeddings=True`"
        )  # they are not shared any more
        merged = load_adapter(model, adapter).merge_and_unload()
    if torch.equal(merged.get_output_embeddings().weight, merged.get_input_embeddings().weight):
        merged.tie_weights()
    else:
        merged.config.tie_word_embeddings = False
    folder, dtype = make_output_dir(output_dir), load_config(model_args).dtype
    merged.to(dtype or model.dtype).save_pretrained(folder)
    load_tokenizer(model_args).save_pretrained(folder)
    logger.info("%s with %s in its weights, as a model in %s", model_args.model_name_or_path, adapter, folder)
    if not (folder / "tokenizer.json").is_file():
        # As a tokenizer.json the `tokenizers` library would give other ids for some texts.
        logger.warning(
            "The tokenizer in %s is read after `import glm_peft`, and not by stock transformers alone, vLLM and the "
            "like, which have none that gives its ids.",
            folder,
        )


def give_head_weights(model: PreTrainedModel) -> None:
    """Give the head weights of its own: what is merged into shared ones would change the embeddings too."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
