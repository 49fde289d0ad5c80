"""What a published `config.json` becomes, what is refused, and what PEFT and `generate` take from it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GlmConfig, PreTrainedConfig

from glm_peft.errors import UserError
from glm_peft.models.glm import GlmConfig as TranslatingConfig

NAMES = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat")
GLM_NAMES = NAMES[1:]
CHATGLM3_VOCABULARY, GLM4_VOCABULARY = 65024, 151552


@pytest.fixture
def folder_with(reference_models, tmp_path):
    """A folder with the config of a reference model, changed; a field set to `None` is taken out."""

    def make(name: str, folder: str = "model", **changes) -> Path:
        config = json.loads((reference_models / name / "config.json").read_text()) | changes
        (tmp_path / folder).mkdir()
        kept = {key: value for key, value in config.items() if value is not None}
        (tmp_path / folder / "config.json").write_text(json.dumps(kept))
        return tmp_path / folder

    return make


def config_of(folder: Path, **kwargs) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(folder, **kwargs)


# Translation


def test_every_published_field_has_its_place(reference_models):
    folder = reference_models / "glm-4-9b-chat"
    config = config_of(folder)
    assert isinstance(config, GlmConfig) and config.model_type == "glm"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (260, 64, 112)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (3, 8, 2)
    assert (config.head_dim, config.max_position_embeddings) == (16, 512)
    assert (config.rms_norm_eps, config.attention_bias, config.tie_word_embeddings) == (1.5625e-07, True, False)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == ([240, 241, 243], 240, None)
    assert config.rope_parameters["rope_theta"] == 5_000_000 and config.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.architectures == ["GlmForCausalLM"] and config.dtype == torch.bfloat16


def test_fields_that_differ_from_the_stock_defaults_are_taken_over(folder_with):
    """GLM-4's values are the defaults of `GlmConfig`, which would hide a field that is lost."""
    config = config_of(folder_with("chatglm2-6b", add_qkv_bias=False, attention_dropout=0.25, use_cache=False))
    assert (config.rms_norm_eps, config.eos_token_id, config.pad_token_id) == (1e-5, 2, 0)
    assert (config.attention_bias, config.attention_dropout, config.use_cache) == (False, 0.25, False)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_published_code_is_left_in_the_config(name, reference_models):
    fields = config_of(reference_models / name).to_dict()
    assert "auto_map" not in fields
    published = {"num_layers", "padded_vocab_size", "multi_query_group_num", "inner_hidden_size", "kv_channels"}
    assert not published & fields.keys()


@pytest.mark.parametrize("name", NAMES)
def test_peft_and_the_auto_class_find_the_same_vocabulary(name, reference_models):
    config = config_of(reference_models / name)
    assert type(config).from_pretrained(reference_models / name).vocab_size == config.vocab_size == 260


@pytest.mark.parametrize("name", GLM_NAMES)
def test_the_class_translates_as_the_auto_class_does(name, reference_models):
    direct, through_auto = (
        read(reference_models / name).to_dict() for read in (TranslatingConfig.from_pretrained, config_of)
    )
    assert (direct.pop("_name_or_path"), through_auto.pop("_name_or_path")) == (
        f"THUDM/{name}",
        str(reference_models / name),
    )
    assert direct == through_auto


def test_the_class_reads_stock_configs_as_they_are(tmp_path):
    stock = GlmConfig(vocab_size=300, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    stock.save_pretrained(tmp_path)
    assert TranslatingConfig.from_pretrained(tmp_path).to_dict() == GlmConfig.from_pretrained(tmp_path).to_dict()


def test_unused_arguments_come_back_and_used_ones_count(reference_models):
    config, unused = config_of(reference_models / "chatglm2-6b", return_unused_kwargs=True, foo=1, use_cache=False)
    assert unused == {"foo": 1} and config.use_cache is False


@pytest.mark.parametrize(
    ("name", "heads", "token_dim"), [("chatglm-6b", 4, 64), *((name, 2, 32) for name in GLM_NAMES)]
)
def test_peft_sizes_the_prefix(name, heads, token_dim, reference_models):
    base = AutoModelForCausalLM.from_pretrained(reference_models / name, dtype=torch.float32)
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    config = model.peft_config["default"]
    assert (config.num_layers, config.num_attention_heads, config.token_dim) == (3, heads, token_dim)


# rope_ratio


@pytest.mark.parametrize(
    ("recorded", "ratio", "expected"),
    [
        ("THUDM/chatglm2-6b-32k", 50, {"rope_type": "linear", "factor": 50.0, "rope_theta": 10000.0}),
        ("THUDM/chatglm3-6b-32k", 50, {"rope_type": "default", "rope_theta": 500000.0}),
        ("THUDM/chatglm3-6b-128k", 500, {"rope_type": "default", "rope_theta": 5e6}),
        ("THUDM/glm-4-9b-chat-1m", 10000, {"rope_type": "default", "rope_theta": 1e8}),
        ("THUDM/chatglm2-6b", 1, {"rope_type": "default", "rope_theta": 10000.0}),
        ("THUDM/chatglm2-6b", None, {"rope_type": "default", "rope_theta": 10000.0}),
        ("somebody/tuned", None, {"rope_type": "default", "rope_theta": 10000.0}),
    ],
)
def test_rope_ratio_means_what_the_recorded_generation_makes_of_it(recorded, ratio, expected, folder_with):
    config = config_of(folder_with("chatglm2-6b", _name_or_path=recorded, rope_ratio=ratio))
    assert config.rope_parameters == expected | {"partial_rotary_factor": 0.5}


@pytest.mark.parametrize("vocabulary", [260, CHATGLM3_VOCABULARY])
@pytest.mark.parametrize("recorded", [None, "somebody/tuned", "THUDM/chatglm-6b"])
def test_a_rope_ratio_of_no_recorded_generation_is_refused_whatever_the_folder_is_called(
    recorded, vocabulary, folder_with
):
    changes = {"rope_ratio": 50, "_name_or_path": recorded, "padded_vocab_size": vocabulary}
    folder = folder_with("chatglm3-6b", folder="chatglm3-6b-32k", **changes)
    for read in (AutoConfig.from_pretrained, TranslatingConfig.from_pretrained):
        with pytest.raises(UserError, match=r"rope_ratio 50, .* say which with generation=") as error:
            read(folder)
        assert "\n" not in str(error.value)


def test_the_vocabulary_of_glm_4_needs_no_name(folder_with):
    folder = folder_with("glm-4-9b-chat", _name_or_path=None, padded_vocab_size=GLM4_VOCABULARY)
    assert config_of(folder).rope_parameters["rope_theta"] == 5_000_000


@pytest.mark.parametrize(("generation", "rope_type"), [("chatglm2", "linear"), ("chatglm3", "default")])
@pytest.mark.parametrize("recorded", [None, "THUDM/chatglm2-6b-32k", "THUDM/chatglm3-6b-32k"])
def test_the_argument_wins_over_the_record(generation, rope_type, recorded, folder_with, reference_models):
    folder = folder_with("chatglm2-6b", rope_ratio=50, _name_or_path=recorded)
    assert config_of(folder, generation=generation).rope_parameters["rope_type"] == rope_type
    direct = TranslatingConfig.from_pretrained(folder, generation=generation)
    assert direct.rope_parameters["rope_type"] == rope_type
    shutil.copy(reference_models / "chatglm2-6b" / "model.safetensors", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, generation=generation)
    assert model.config.rope_parameters["rope_type"] == rope_type


# What ends an answer


@pytest.mark.parametrize(
    ("name", "vocabulary", "ends"),
    [
        ("chatglm3-6b", CHATGLM3_VOCABULARY, [2, 64795, 64797]),
        ("chatglm3-6b", 260, 2),
        ("chatglm2-6b", CHATGLM3_VOCABULARY, 2),
    ],
)
def test_chatglm3_stops_at_its_role_tokens_too(name, vocabulary, ends, folder_with):
    assert config_of(folder_with(name, padded_vocab_size=vocabulary)).eos_token_id == ends


def test_ends_and_padding_have_the_published_defaults_where_the_config_is_silent(folder_with):
    config = config_of(folder_with("chatglm2-6b", eos_token_id=None, pad_token_id=None))
    assert (config.eos_token_id, config.pad_token_id) == (2, 0)


@pytest.mark.parametrize(
    ("name", "end", "padding"),
    [("chatglm-6b", 255, 3), ("chatglm2-6b", 2, 0), ("glm-4-9b-chat", [240, 241, 243], 240)],
)
def test_generation_takes_its_ends_from_the_config(name, end, padding, reference_models):
    generation = AutoModelForCausalLM.from_pretrained(reference_models / name).generation_config
    assert (generation.eos_token_id, generation.pad_token_id, generation.do_sample) == (end, padding, None)


@pytest.mark.parametrize("name", NAMES)
def test_a_generation_config_in_the_folder_wins(name, reference_models, tmp_path):
    folder = shutil.copytree(reference_models / name, tmp_path / "model")
    published = {"do_sample": True, "temperature": 0.8, "top_p": 0.8, "max_length": 99, "eos_token_id": [7, 8]}
    (folder / "generation_config.json").write_text(json.dumps(published))
    found = AutoModelForCausalLM.from_pretrained(folder).generation_config.to_dict()
    assert {key: found[key] for key in published} == published


# Refusals


@pytest.mark.parametrize(("name", "bits"), [("chatglm-6b", 4), ("chatglm2-6b", 8)])
def test_pre_quantized_weights_are_refused(name, bits, folder_with):
    recorded = f"THUDM/{name}-int{bits}"
    folder = folder_with(name, quantization_bit=bits, _name_or_path=recorded)
    words = rf"{recorded} holds pre-quantized int{bits} weights .* without -int{bits} and --quantization_bit 4 or 8"
    with pytest.raises(UserError, match=words) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_quantization_bit_of_zero_is_none(folder_with):
    assert config_of(folder_with("chatglm2-6b", quantization_bit=0)).model_type == "glm"


def test_an_unknown_generation_is_refused(folder_with):
    folder = folder_with("chatglm-6b", position_encoding_2d=None, inner_hidden_size=None)
    with pytest.raises(
        UserError, match=r"known generations are ChatGLM-6B, .* use one of their repositories"
    ) as error:
        config_of(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("add_bias_linear", True),
        ("rmsnorm", False),
        ("post_layer_norm", False),
        ("apply_residual_connection_post_layernorm", True),
        ("multi_query_attention", False),
        ("original_rope", False),
    ],
)
def test_another_network_is_refused_by_the_name_of_its_field(field, value, folder_with):
    folder = folder_with("chatglm3-6b", **{field: value})
    with pytest.raises(UserError, match=f"says {field}: {value}, but .* have {field}: {not value}") as error:
        config_of(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "generation", "possible"),
    [
        ("chatglm-6b", "chatglm2", "chatglm"),
        ("chatglm2-6b", "chatglm", "chatglm2 or chatglm3 or glm4"),
        ("chatglm3-6b", "chatglm3-6b", "chatglm2 or chatglm3 or glm4"),
    ],
)
def test_a_generation_that_the_fields_are_not_of_is_refused(name, generation, possible, folder_with):
    words = f"of THUDM/{name} is of {possible} by its fields, but generation='{generation}' was asked for"
    with pytest.raises(UserError, match=words) as error:
        config_of(folder_with(name), generation=generation)
    assert "\n" not in str(error.value)
