"""ChatGLM-6B: its positions, its mask, what `generate` does with it, with and without a prefix of PEFT's."""

import pytest
import torch
from closeness import ROUNDING, assert_close
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from plain_networks import plain_logits
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from glm_peft.errors import UserError
from glm_peft.models import ChatGLMConfig, ChatGLMForCausalLM
from glm_peft.models.chatglm.positions import build_position_rows

PAD, MASK, GMASK, SOP = 3, 250, 251, 254
PROMPTS = [[10, 11, 12, 13, 14, GMASK, SOP], [20, GMASK, SOP], [30, 31, MASK, 32, SOP]]
STEPS = 6
VIRTUAL_TOKENS = 5


def load(folder, **kwargs) -> ChatGLMForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


@pytest.fixture(scope="module")
def folder(reference_models):
    return reference_models / "chatglm-6b"


@pytest.fixture(scope="module")
def model(folder) -> ChatGLMForCausalLM:
    return load(folder)


@pytest.fixture(scope="module")
def prefixed(folder) -> PeftModel:
    torch.manual_seed(0)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS)
    return get_peft_model(load(folder), config).eval()


@pytest.fixture(params=["base", "prefix"])
def either(request) -> ChatGLMForCausalLM | PeftModel:
    return request.getfixturevalue("model" if request.param == "base" else "prefixed")


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    width = max(map(len, PROMPTS))
    input_ids = torch.tensor([[PAD] * (width - len(row)) + row for row in PROMPTS])
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}


def generate(model, inputs: dict[str, torch.Tensor], **kwargs) -> tuple[list[list[int]], torch.Tensor]:
    """The new tokens and the logits that they were chosen by, [batch, steps, vocabulary]."""
    kwargs = {"do_sample": False, "eos_token_id": None, "max_new_tokens": STEPS} | kwargs
    output = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **kwargs)
    return output.sequences[:, inputs["input_ids"].shape[1] :].tolist(), torch.stack(output.logits, dim=1)


def alone(row: list[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}


def assert_same(actual: tuple[list[list[int]], torch.Tensor], expected: tuple[list[list[int]], torch.Tensor]) -> None:
    assert actual[0] == expected[0]
    assert_close(actual[1], expected[1])


# Positions


@pytest.mark.parametrize(
    ("ids", "row_0", "row_1"),
    [
        ([9, 8, GMASK, SOP], [0, 1, 2, 2], [0, 0, 0, 1]),
        ([9, GMASK, 8, SOP, 5, 6], [0, 1, 2, 1, 1, 1], [0, 0, 0, 1, 2, 3]),
        ([MASK, 9, SOP, 5], [0, 1, 0, 0], [0, 0, 1, 2]),
        ([MASK, 9, GMASK, SOP, 5], [0, 1, 2, 2, 2], [0, 0, 0, 1, 2]),
        ([9, GMASK, GMASK, SOP, 5], [0, 1, 2, 1, 1], [0, 0, 0, 1, 2]),
        ([9, GMASK, SOP, SOP, GMASK, MASK], [0, 1, 1, 1, 1, 1], [0, 0, 1, 2, 3, 4]),
        ([PAD, PAD, 9, 8, GMASK, SOP, 5], [0, 0, 0, 1, 2, 2, 2], [0, 0, 0, 0, 0, 1, 2]),
        ([9, GMASK, SOP, 5, PAD], [0, 1, 1, 1, 1], [0, 0, 1, 2, 3]),
    ],
)
def test_position_rows(ids, row_0, row_1, model):
    input_ids = torch.tensor([ids])
    rows = build_position_rows(input_ids, (input_ids != PAD).long(), model.config)
    assert rows.tolist() == [[row_0, row_1]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([9, 8, GMASK], r"Row 1 .* <sop> \(id 254\)"),
        ([9, 8, SOP], r"Row 1 .* \[gMASK\] or \[MASK\] before <sop> \(id 251 or 250\)"),
        ([9, SOP, GMASK], r"Row 1 .* \[gMASK\] or \[MASK\] before <sop> \(id 251 or 250\)"),
    ],
)
def test_a_row_without_its_control_tokens_is_refused_with_their_ids(row, words, model):
    with pytest.raises(UserError, match=words) as error:
        model(input_ids=torch.tensor([[9, GMASK, SOP], row]))
    assert "\n" not in str(error.value)


def test_a_control_token_under_padding_does_not_count(model):
    with pytest.raises(UserError, match="Row 0 .* <sop>"):
        model(torch.tensor([[GMASK, SOP, 9, 8]]), attention_mask=torch.tensor([[0, 0, 1, 1]]))


@torch.no_grad()
def test_later_control_tokens_change_nothing_of_the_network(folder, model):
    ids = [9, 8, GMASK, SOP, 5, SOP, GMASK, 6, MASK, SOP, 7]
    assert_close(model(torch.tensor([ids])).logits[0], plain_logits(folder, ids).float())


@torch.no_grad()
def test_position_ids_are_ignored(either, batch):
    other = torch.arange(batch["input_ids"].shape[1]) * 7
    expected = either(**batch).logits[:, -1]
    assert torch.equal(either(**batch, position_ids=other[None].expand(3, -1)).logits[:, -1], expected)


def test_the_older_revision_has_its_ids_where_its_config_leaves_them_out():
    config = ChatGLMConfig.from_dict({"model_type": "chatglm", "vocab_size": 150528, "inner_hidden_size": 16384})
    assert (config.mask_token_id, config.gmask_token_id, config.pad_token_id) == (150000, 150001, 20003)
    assert (config.bos_token_id, config.eos_token_id) == (150004, 150005)
    told = ChatGLMConfig.from_dict({"vocab_size": 150528, "inner_hidden_size": 16384, "pad_token_id": 7})
    assert told.pad_token_id == 7


# The network


@torch.no_grad()
def test_embeddings_and_position_rows_can_be_given_instead_of_ids(model, batch):
    rows = build_position_rows(**batch, config=model.config)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    logits = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], position_rows=rows).logits
    assert torch.equal(logits, model(**batch).logits)
    with pytest.raises(ValueError, match="Expected position_rows beside inputs_embeds"):
        model(inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(inputs_embeds=embeddings, input_ids=batch["input_ids"])


@torch.no_grad()
def test_hidden_states_attentions_and_fewer_logits_on_request(folder, batch):
    model = load(folder, attn_implementation="eager")
    output = model(**batch, output_hidden_states=True, output_attentions=True, logits_to_keep=1)
    length = batch["input_ids"].shape[1]
    assert [tuple(state.shape) for state in output.hidden_states] == [(3, length, 64)] * 4
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, length, length)] * 3
    assert_close(output.logits, model(**batch).logits[:, -1:])


def test_the_prompt_sees_all_of_itself_and_the_answer_what_came_before(folder):
    model = load(folder, attn_implementation="eager")
    with torch.no_grad():
        weights = model(torch.tensor([[9, 8, GMASK, SOP, 5]]), output_attentions=True).attentions[0]
    expected = [[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert (weights[0, 0] > 0).int().tolist() == expected


def test_flex_attention_is_the_same(either, batch):
    expected = generate(either, batch)
    base = either.get_base_model() if isinstance(either, PeftModel) else either
    before = base.config._attn_implementation
    base.set_attn_implementation("flex_attention")
    # Not compiled, as a machine for tests need not have a compiler.
    with torch.compiler.set_stance("force_eager"):
        found = generate(either, batch)
    base.set_attn_implementation(before)
    assert_same(found, expected)


def test_flash_attention_which_has_no_such_mask_is_refused(folder):
    with pytest.raises(ValueError, match="ChatGLMForCausalLM does not support Flash Attention"):
        load(folder, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_equal_gradients(use_reentrant, folder, batch):
    model = load(folder).train()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch, labels=labels, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    model.transformer.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients()
    assert len(calls) == 2, "the layer was computed again for its gradient"
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@torch.no_grad()
def test_half_precision_keeps_the_frequencies_in_float32(folder, model, batch):
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    frequencies = half.transformer.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, (10000.0 ** (-torch.arange(4) / 4)).half().float())
    assert (half(**batch).logits[:, -1] - model(**batch).logits[:, -1]).abs().max() < 0.5


# Generation


def test_a_left_padded_batch_generates_what_its_rows_do_alone(either, batch):
    tokens, logits = generate(either, batch)
    for index, row in enumerate(PROMPTS):
        assert_same(generate(either, alone(row)), (tokens[index : index + 1], logits[index : index + 1]))


def test_generation_without_the_cache_is_the_same(either, batch):
    assert_same(generate(either, batch, use_cache=False), generate(either, batch))


def test_the_prefix_changes_what_is_generated(model, prefixed, batch):
    assert generate(model, batch)[0] != generate(prefixed, batch)[0]
    with prefixed.disable_adapter():
        assert_same(generate(prefixed, batch), generate(model, batch))


@torch.no_grad()
def test_generation_with_a_prefix_starts_where_the_forward_pass_does(prefixed, batch):
    logits = prefixed(**batch).logits[:, -1]
    assert_close(generate(prefixed, batch)[1][:, 0], logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_static_cache_keeps_the_prompt_bidirectional(implementation, folder, model, batch):
    other = load(folder, attn_implementation=implementation)
    assert_same(generate(other, batch, cache_implementation="static"), generate(model, batch))


def beams(model, inputs: dict[str, torch.Tensor], **kwargs) -> tuple[list[list[int]], torch.Tensor]:
    kwargs = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False, "max_new_tokens": STEPS} | kwargs
    output = model.generate(**inputs, output_scores=True, return_dict_in_generate=True, **kwargs)
    return output.sequences[:, inputs["input_ids"].shape[1] :].tolist(), output.sequences_scores


def test_beams_of_a_batch_are_those_of_its_rows_alone(either, batch):
    tokens, scores = beams(either, batch, eos_token_id=None)
    for index, row in enumerate(PROMPTS):
        own = slice(3 * index, 3 * index + 3)
        assert len({tuple(beam) for beam in tokens[own]}) == 3
        assert_same(beams(either, alone(row), eos_token_id=None), (tokens[own], scores[own]))


def test_beams_without_the_cache_are_the_same(either, batch):
    assert_same(beams(either, batch, use_cache=False), beams(either, batch))


def test_a_beams_score_is_the_probability_of_its_tokens(folder, model):
    tokens, scores = beams(model, alone(PROMPTS[0]), eos_token_id=None)
    for row, score in zip(tokens, scores, strict=True):
        log_probabilities = plain_logits(folder, PROMPTS[0] + row).log_softmax(dim=-1)[-STEPS - 1 : -1]
        expected = log_probabilities[range(STEPS), row].mean()
        assert float(score) == pytest.approx(float(expected), rel=ROUNDING)


def test_sampling_draws_by_the_seed_and_from_the_cache_what_is_drawn_without(either, batch):
    def draw(seed: int, **kwargs) -> list[list[int]]:
        torch.manual_seed(seed)
        return generate(either, batch, do_sample=True, temperature=2.0, top_k=0, max_new_tokens=12, **kwargs)[0]

    assert draw(1) == draw(1) == draw(1, use_cache=False)
    assert draw(1) != draw(2)
    greedy = generate(either, batch)[0]
    assert generate(either, batch, do_sample=True, top_k=1)[0] == greedy


def test_generation_stops_at_the_end_token_and_pads(model, batch):
    tokens = generate(model, batch)[0]
    end = tokens[0][2]
    stopped = generate(model, batch, eos_token_id=end)[0]
    cut = tokens[0].index(end) + 1
    assert stopped[0][:cut] == tokens[0][:cut] and set(stopped[0][cut:]) <= {PAD}


def test_prompt_lookup_decoding_takes_the_greedy_steps(model):
    inputs = alone([5, 6, 7, 5, 6, 7, GMASK, SOP])
    assert generate(model, inputs, prompt_lookup_num_tokens=3)[0] == generate(model, inputs)[0]


# PEFT


def test_peft_sizes_the_prefix_by_the_config(prefixed):
    config = prefixed.peft_config["default"]
    assert (config.num_layers, config.num_attention_heads, config.token_dim) == (3, 4, 64)
    assert prefixed.prompt_encoder["default"].embedding.weight.shape == (VIRTUAL_TOKENS, 3 * 2 * 64)


def test_a_saved_prefix_is_the_prefix_alone_and_loads_again(prefixed, folder, batch, tmp_path):
    prefixed.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == {
        "prompt_embeddings": (VIRTUAL_TOKENS, 3 * 2 * 64)
    }
    again = PeftModel.from_pretrained(load(folder), tmp_path)
    assert_same(generate(again, batch), generate(prefixed, batch))


def test_peft_finds_the_vocabulary_of_the_base(folder, model):
    assert type(model.config).from_pretrained(folder).vocab_size == model.config.vocab_size == 260


# Resizing and configs


def test_the_head_stays_tied_when_the_embeddings_grow(folder):
    model = load(folder)
    model.resize_token_embeddings(272, mean_resizing=False)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert model.config.vocab_size == 272 and model(torch.tensor([PROMPTS[0]])).logits.shape[-1] == 272


def test_published_and_standard_field_names_are_the_same_fields(folder):
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_layers, config.inner_hidden_size) == (config.num_hidden_layers, config.intermediate_size)
    assert (config.num_hidden_layers, config.intermediate_size, config.max_position_embeddings) == (3, 160, 256)
    assert (config.head_dim, config.num_key_value_heads, config.layer_norm_eps) == (16, 4, 1e-5)
