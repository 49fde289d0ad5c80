"""A prefix that starts from text is that text in front of the prompt."""

import pytest
import torch
from closeness import assert_close
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm_peft.adapters.loading import create_adapter
from glm_peft.adapters.prefix_attention import attach_prefix_attention
from glm_peft.adapters.prefix_initialization import initialize_from_text, initialize_normal, initialize_prefix
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError

INSTRUCTION = [40, 41, 42, 43, 44, 45]
PROMPT = [7, 8, 9, 251, 254, 10, 11, 12]


def make_model(folder, num_virtual_tokens: int = 6, prefix_projection: bool = False) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    arguments = ModelArguments("base", num_virtual_tokens=num_virtual_tokens, prefix_projection=prefix_projection)
    return create_adapter(base, arguments).eval()


def logits_of(model, ids: list[int]) -> torch.Tensor:
    inputs = torch.tensor([ids])
    with torch.no_grad():
        return model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0]


@pytest.mark.parametrize("name", ["chatglm2-6b", "glm-4-9b-chat", "glm4_0414"])
def test_a_prefix_from_text_equals_the_text_in_front(name, reference_models, tiny_model_dirs):
    folder = tiny_model_dirs[name] if name == "glm4_0414" else reference_models / name
    model = make_model(folder)
    initialize_from_text(model, INSTRUCTION)
    expected = logits_of(model.get_base_model(), INSTRUCTION + PROMPT)[len(INSTRUCTION) :]
    assert_close(logits_of(model, PROMPT), expected)


def test_in_chatglm_6b_only_the_mask_differs_from_the_text_in_front(reference_models):
    model = make_model(reference_models / "chatglm-6b")
    base = model.get_base_model()
    initialize_from_text(model, INSTRUCTION)
    expected = masked_logits(base, INSTRUCTION, PROMPT)
    assert_close(logits_of(model, PROMPT), expected)


def masked_logits(base, instruction: list[int], prompt: list[int]) -> torch.Tensor:
    """The instruction in front of the prompt, but unable to see it."""
    ids = torch.tensor([instruction + prompt])
    length, total = len(instruction), len(instruction) + len(prompt)
    sop = length + prompt.index(254)
    visible = torch.ones(total, total, dtype=torch.bool).tril()
    visible[:length, :length] = True
    visible[length:, :sop] = True
    with torch.no_grad():
        return base(input_ids=ids, attention_mask=visible[None, None]).logits[0, length:]


@pytest.mark.parametrize("num_virtual_tokens", [4, 15])
def test_text_is_cut_or_repeated_to_the_length_of_the_prefix(num_virtual_tokens, reference_models):
    model = make_model(reference_models / "chatglm2-6b", num_virtual_tokens)
    initialize_from_text(model, INSTRUCTION)
    text = (INSTRUCTION * 3)[:num_virtual_tokens]
    expected = logits_of(model.get_base_model(), text + PROMPT)[num_virtual_tokens:]
    assert_close(logits_of(model, PROMPT), expected)


def test_a_prefix_starts_at_zero_or_as_the_neutral_instruction_of_its_generation(tiny_model_dirs):
    folder, model = tiny_model_dirs["chatglm2"], make_model(tiny_model_dirs["chatglm2"], 40)
    tokenizer, weight = AutoTokenizer.from_pretrained(folder), model.prompt_encoder["default"].embedding.weight
    initialize_prefix(model, tokenizer, ModelArguments("base", prefix_init="zero"), "chatglm2")
    assert not weight.any()
    initialize_prefix(model, tokenizer, ModelArguments("base", prefix_init="instruction"), "chatglm2")
    found = weight.clone()
    text = "你是一个名为 ChatGLM2-6B 的人工智能助手，请针对用户的问题和要求提供适当的答复和支持。"
    initialize_prefix(model, tokenizer, ModelArguments("base", prefix_init="text", prefix_init_text=text), "chatglm3")
    assert found.any() and torch.equal(found, weight)
    for start in ("zero", "instruction"):
        with pytest.raises(UserError, match=f"--prefix_init {start} sets the prefix itself"):
            ModelArguments("base", prefix_init=start, prefix_projection=True)


def test_text_and_projection_exclude_each_other(reference_models):
    with pytest.raises(UserError, match="leave out --prefix_projection"):
        initialize_from_text(make_model(reference_models / "chatglm-6b", prefix_projection=True), INSTRUCTION)


def test_an_empty_text_is_refused(reference_models):
    with pytest.raises(UserError, match="--prefix_init_text is empty"):
        initialize_from_text(make_model(reference_models / "chatglm-6b"), [])


def test_normal_numbers_have_the_deviation_that_was_asked_for(reference_models):
    model = make_model(reference_models / "chatglm-6b", num_virtual_tokens=64)
    initialize_normal(model, 0.02)
    assert model.prompt_encoder["default"].embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_dropout_acts_in_training_only_and_not_on_what_is_saved(reference_models, tmp_path):
    model = make_model(reference_models / "chatglm-6b")
    expected = logits_of(model, PROMPT)
    attach_prefix_attention(model, dropout=0.5)
    assert_close(logits_of(model, PROMPT), expected)
    model.train()
    assert not torch.allclose(logits_of(model, PROMPT), expected)
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(reference_models / "chatglm-6b", dtype=torch.float32)
    assert_close(logits_of(PeftModel.from_pretrained(base, tmp_path).eval(), PROMPT), expected)
