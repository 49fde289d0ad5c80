"""`--torch_compile`: the same numbers, from one graph for all layers and all shapes."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from short_runs import run, training_words
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from glm_peft.adapters.compilation import compile_layers
from glm_peft.adapters.label_loss import attach_label_loss
from glm_peft.adapters.loading import create_adapter
from glm_peft.adapters.prefix_attention import attach_prefix_attention, decoder_layers
from glm_peft.arguments.model import ModelArguments

# What captures the graphs is tested; what a backend makes of them is torch's.
BACKEND = "eager"


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def make_model(folder: Path, checkpointing: bool) -> PeftModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = create_adapter(base, ModelArguments("base", num_virtual_tokens=5)).train()
    attach_prefix_attention(model)
    attach_label_loss(base)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(20, 200, (rows, length), generator=torch.Generator().manual_seed(length))
    ids[:, 4], ids[:, 5] = 251, 254
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1) * mask,
        "labels": ids.where(mask == 1, -100),
    }


def loss_and_gradient(model: PeftModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), model.prompt_encoder["default"].embedding.weight.grad.clone()


@pytest.mark.parametrize(("name", "checkpointing"), [("chatglm-6b", True), ("glm-4-9b-chat", False)])
def test_compiled_layers_give_the_same_from_the_graphs_of_the_first_batch(name, checkpointing, reference_models):
    folder = reference_models / name
    model, compiled = make_model(folder, checkpointing), make_model(folder, checkpointing)
    compile_layers(compiled.get_base_model(), BACKEND)
    graphs = []
    for shape in ((3, 12), (4, 15), (2, 19)):
        expected = loss_and_gradient(model, make_batch(*shape))
        found = loss_and_gradient(compiled, make_batch(*shape))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        graphs.append(counters["stats"]["unique_graphs"])
    # Two at most: to the first layer's input no gradient flows.
    assert 1 <= graphs[0] <= 2 <= len(decoder_layers(model)) and graphs == graphs[:1] * 3


def test_generation_stays_uncompiled(reference_models):
    model = make_model(reference_models / "chatglm-6b", checkpointing=False)
    compile_layers(model.get_base_model(), BACKEND)
    model.eval()
    batch = make_batch(2, 7)
    model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=2)
    assert counters["stats"]["unique_graphs"] == 0


def test_a_compiled_run_trains_the_same_adapter(tiny_model_dirs, tmp_path):
    for name, flags in (("eager", []), ("compiled", ["--torch_compile", "--torch_compile_backend", "aot_eager"])):
        run(training_words(tiny_model_dirs["chatglm2"], tmp_path / name, "--max_steps", "3", *flags))
    assert counters["stats"]["unique_graphs"] >= 1
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("eager", "compiled")]
    assert torch.equal(saved[0]["prompt_embeddings"], saved[1]["prompt_embeddings"])
