"""The first token of an answer: one product with the head, whatever the layout of the states that it takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from peft import PrefixTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from glm_peft.adapters.loading import load_adapter
from glm_peft.arguments.model import ModelArguments
from glm_peft.models.loading import load_base_model, load_tokenizer


class Products(TorchDispatchMode):
    """Note the shapes of all products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.shapes.append(result.shape)
        return result


def load_own(folder: str, adapter: Path) -> PreTrainedModel:
    return load_base_model(ModelArguments(folder), "cpu")


def load_stock(folder: str, adapter: Path) -> PreTrainedModel:
    """As Python users do, who put an adapter on it, here twice."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(adapter)
    for _ in range(2):
        base = load_adapter(base, str(adapter)).get_base_model()
    return base


@pytest.mark.parametrize("load", [load_own, load_stock])
@pytest.mark.parametrize("generation", ["chatglm", "chatglm3", "glm4_0414"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_first_token_takes_one_product_with_the_head(
    tiny_model_dirs: dict[str, Path], tmp_path: Path, load: Callable[..., Any], generation: str, rows: int
) -> None:
    arguments = ModelArguments(str(tiny_model_dirs[generation]))
    base = load(str(tiny_model_dirs[generation]), tmp_path)
    vocabulary = base.config.vocab_size
    ids = torch.tensor([load_tokenizer(arguments)("类型#裤")["input_ids"]] * rows)
    with torch.no_grad(), Products() as products:
        logits = base(input_ids=ids, logits_to_keep=1).logits
        whole = base(input_ids=ids).logits
    assert logits.shape == (rows, 1, vocabulary)
    # As a batch of products, [rows, 1, vocabulary], the head would be copied for each of its rows.
    with_head = [shape for shape in products.shapes if shape[-1] == vocabulary]
    assert with_head == [(rows, vocabulary), (ids.numel(), vocabulary)]
    assert_close(logits, whole[:, -1:])
    assert len(base.get_output_embeddings()._forward_pre_hooks) == 1
