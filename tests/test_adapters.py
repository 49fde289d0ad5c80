"""Published P-Tuning v2 checkpoints as adapters, held to what the published code computed with them."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import glm_peft  # noqa: F401
from glm_peft.adapters.loading import create_adapter, load_adapter
from glm_peft.adapters.published_checkpoints import read_published_prefix, rotate_prefix_keys
from glm_peft.adapters.saved_adapter import read_saved_adapter, resolve_adapter
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError

NAMES = ["chatglm-6b", "chatglm2-6b", "chatglm3-6b"]
TAGS = ["prefix", "prefix_projection"]


def make_arguments(**values) -> ModelArguments:
    """The model arguments that make an adapter."""
    return ModelArguments("base", **{"num_virtual_tokens": 4, **values})


def load_base(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(params=[(name, tag) for name in NAMES for tag in TAGS], ids=lambda pair: "-".join(pair))
def published(request, reference_models):
    name, tag = request.param
    folder = reference_models / name
    expected = load_file(folder / "expected.safetensors")
    expected = {key.removeprefix(f"{tag}."): value for key, value in expected.items() if key.startswith(f"{tag}.")}
    return load_base(folder), folder / f"ptuning-{tag}", expected


@torch.no_grad()
def test_a_published_prefix_gives_the_published_logits_and_losses(published):
    base, checkpoint, expected = published
    model = load_adapter(base, str(checkpoint)).eval()
    for i in range(3):
        ids, labels = expected[f"single{i}.input_ids"], expected[f"single{i}.labels"]
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        assert_close(output.logits, expected[f"single{i}.logits"])
        assert_close(output.loss, expected[f"single{i}.loss"][0])


@torch.no_grad()
def test_a_published_prefix_gives_the_published_logits_in_a_left_padded_batch(published):
    base, checkpoint, expected = published
    model = load_adapter(base, str(checkpoint)).eval()
    mask = expected["batch.attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=expected["batch.input_ids"], attention_mask=mask, position_ids=positions)
    assert_close(output.logits[:, -1], expected["batch.last_logits"])


def test_a_published_prefix_generates_what_the_published_code_generates(published):
    base, checkpoint, expected = published
    model = load_adapter(base, str(checkpoint)).eval()
    for i in range(3):
        ids = expected[f"greedy{i}.input_ids"]
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert output.sequences[0, ids.shape[1] :].tolist() == expected[f"greedy{i}.tokens"].tolist()
        assert_close(torch.cat(output.logits), expected[f"greedy{i}.logits"])


def test_gradients_of_the_prefix_are_the_published_ones(published):
    base, checkpoint, expected = published
    model = load_adapter(base, str(checkpoint), is_trainable=True).eval()
    ids = expected["single2.input_ids"]
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=expected["single2.labels"]).loss.backward()
    encoder = model.prompt_encoder["default"]
    if hasattr(encoder, "transform"):
        found = {name.replace("transform", "trans"): value.grad for name, value in encoder.named_parameters()}
    else:
        found = gradients_of_the_published_parameters(checkpoint, encoder.embedding.weight.grad, base)
    assert found.keys() == {name.removeprefix("grad.") for name in expected if name.startswith("grad.")}
    for name, gradient in found.items():
        assert_close(gradient, expected[f"grad.{name}"])


def gradients_of_the_published_parameters(checkpoint: Path, gradient: torch.Tensor, base) -> dict[str, torch.Tensor]:
    """The chain rule from PEFT's flat prefix back through the rotation and the published projection."""
    state = torch.load(checkpoint / "pytorch_model.bin", weights_only=True)
    state = {name.split("prefix_encoder.")[1]: value.float().requires_grad_() for name, value in state.items()}
    flat = state["embedding.weight"]
    if "trans.0.weight" in state:
        hidden = torch.tanh(torch.nn.functional.linear(flat, state["trans.0.weight"], state["trans.0.bias"]))
        flat = torch.nn.functional.linear(hidden, state["trans.2.weight"], state["trans.2.bias"])
    flat.backward(rotate_prefix_keys(gradient, base.config, -len(gradient)))
    return {name: value.grad for name, value in state.items()}


def test_rotating_back_undoes_the_rotation(reference_models):
    base = load_base(reference_models / "chatglm2-6b")
    weight = torch.randn(5, 192)
    rotated = rotate_prefix_keys(weight, base.config)
    assert not torch.allclose(rotated, weight)
    assert_close(rotate_prefix_keys(rotated, base.config, -5), weight)


@pytest.mark.parametrize("form", ["safetensors", "sharded pickle", "whole model"])
def test_a_checkpoint_is_read_in_every_form_that_scripts_saved(form, reference_models, tmp_path):
    source = reference_models / "chatglm-6b" / "ptuning-prefix_projection"
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    if form == "safetensors":
        save_file(state, tmp_path / "model.safetensors")
    elif form == "whole model":
        base = load_file(reference_models / "chatglm-6b" / "model.safetensors")
        torch.save(base | state, tmp_path / "pytorch_model.bin")
    else:
        write_shards(state, tmp_path)
    expected, found = read_published_prefix(source), read_published_prefix(tmp_path)
    # Not to the bit: a product's last one depends on how the tensors lie in memory.
    assert_close(found.weight, expected.weight)


def write_shards(state: dict[str, torch.Tensor], folder: Path) -> None:
    names = {key: f"pytorch_model-{i:05d}-of-{len(state):05d}.bin" for i, key in enumerate(state, 1)}
    for key, file in names.items():
        torch.save({key: state[key]}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"transformer.prefix_encoder.embedding.weight": torch.zeros(2, 4), "x": Bomb()}, "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is not a file of plain tensors.*nothing in it is run"):
        read_published_prefix(tmp_path)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("command", ["os.system", "pathlib.Path.touch"])
def test_a_bare_pickle_with_code_in_it_is_refused_and_not_run(protocol, command, tmp_path):
    exploded = tmp_path / "exploded"
    bomb = (os.system, (f"touch {exploded}",)) if command == "os.system" else (Path.touch, (exploded,))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Reduced(bomb), protocol))
    with pytest.raises(UserError, match="nothing in it is run"):
        read_published_prefix(tmp_path)
    assert not exploded.exists()
    pickle.loads((tmp_path / "pytorch_model.bin").read_bytes())
    assert exploded.exists()  # it would have been


class Reduced:
    def __init__(self, reduced: tuple) -> None:
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def test_a_checkpoint_without_a_prefix_is_named(reference_models):
    with pytest.raises(UserError, match="holds no P-Tuning v2 prefix"):
        read_published_prefix(reference_models / "chatglm-6b")


def test_a_published_prefix_of_another_base_is_refused_with_both_sizes(reference_models):
    base = load_base(reference_models / "chatglm2-6b")
    checkpoint = str(reference_models / "chatglm-6b" / "ptuning-prefix")
    with pytest.raises(UserError, match="has 384 parameters per virtual token, but .*chatglm2-6b needs 192"):
        load_adapter(base, checkpoint)


def test_an_adapter_of_another_base_is_refused_with_both_sizes(reference_models, tmp_path):
    create_adapter(load_base(reference_models / "chatglm-6b"), make_arguments()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="3 layers of width 64 .*chatglm-6b.*has 3 layers of width 32"):
        load_adapter(load_base(reference_models / "chatglm2-6b"), str(tmp_path))


def test_a_folder_without_an_adapter_is_refused(reference_models, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is an empty folder, and a PEFT adapter or"):
        load_adapter(load_base(reference_models / "chatglm-6b"), str(tmp_path))


@pytest.mark.parametrize("name", [*NAMES, "glm-4-9b-chat"])
def test_an_adapter_holds_its_prefix_and_nothing_of_the_base(name, reference_models, tmp_path):
    base = load_base(reference_models / name)
    create_adapter(base, make_arguments()).save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {"prompt_embeddings"}


@pytest.mark.parametrize("name", [*NAMES, "glm-4-9b-chat"])
@pytest.mark.parametrize("projection", [False, True])
@torch.no_grad()
def test_stock_peft_loads_what_was_saved(name, projection, reference_models, tmp_path):
    ids = torch.tensor([[7, 8, 9, 251, 254, 10]])
    model = create_adapter(load_base(reference_models / name), make_arguments(prefix_projection=projection)).eval()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    model.save_pretrained(tmp_path)
    by_base = PeftModel.from_pretrained(load_base(reference_models / name), tmp_path).eval()
    by_adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for loaded in (by_base, by_adapter):
        output = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert_close(output, logits)
        with loaded.disable_adapter():
            without = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert_close(without, load_base(reference_models / name)(ids).logits)


@pytest.mark.parametrize("name", [*NAMES, "glm-4-9b-chat"])
@pytest.mark.parametrize("projection", [False, True])
def test_training_continues_from_the_saved_loss(name, projection, reference_models, tmp_path):
    ids = torch.tensor([[7, 8, 9, 251, 254, 10, 11]])
    model = create_adapter(load_base(reference_models / name), make_arguments(prefix_projection=projection)).eval()
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    model.save_pretrained(tmp_path)
    base = load_base(reference_models / name)
    continued = create_adapter(base, make_arguments(adapter_name_or_path=str(tmp_path))).eval()
    again = continued(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    torch.testing.assert_close(again, loss)
    again.backward()
    trained = {name: value.grad.abs().max() for name, value in continued.named_parameters() if value.requires_grad}
    assert trained.keys() == {"prompt_encoder.default.embedding.weight"}  # flat, whatever it was trained through
    assert min(trained.values()) > 0


def test_training_continues_from_the_published_loss(published):
    base, checkpoint, expected = published
    model = create_adapter(base, make_arguments(adapter_name_or_path=str(checkpoint))).eval()
    for i in range(3):
        ids, labels = expected[f"single{i}.input_ids"], expected[f"single{i}.labels"]
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        assert_close(loss, expected[f"single{i}.loss"][0])
    loss.backward()
    assert all(value.grad.abs().max() > 0 for value in model.parameters() if value.requires_grad)


# What the adapter decides, and what contradicts it


def model_arguments(base: Path, adapter: Path | None, **values) -> ModelArguments:
    return ModelArguments(model_name_or_path=str(base), adapter_name_or_path=adapter and str(adapter), **values)


def settled(arguments: ModelArguments, is_trainable: bool = True) -> tuple:
    arguments, _ = resolve_adapter(arguments, is_trainable)
    return arguments.num_virtual_tokens, arguments.prefix_projection, arguments.encoder_hidden_size


def test_without_an_adapter_the_prefix_has_the_usual_size(reference_models):
    assert settled(model_arguments(reference_models / "chatglm-6b", None)) == (128, False, None)


@pytest.mark.parametrize("projection", [False, True])
def test_an_adapter_says_how_the_prefix_goes_on(projection, reference_models, tmp_path):
    base = reference_models / "chatglm-6b"
    create_adapter(load_base(base), make_arguments(prefix_projection=projection)).save_pretrained(tmp_path)
    assert settled(model_arguments(base, tmp_path)) == (4, False, None)
    assert settled(model_arguments(base, tmp_path, num_virtual_tokens=4, prefix_projection=False)) == (4, False, None)
    for values, said in (
        ({"num_virtual_tokens": 5}, "--num_virtual_tokens 5 contradicts .* goes on with num_virtual_tokens 4"),
        ({"num_virtual_tokens": 128}, "--num_virtual_tokens 128 contradicts"),
        ({"prefix_projection": True}, "--prefix_projection true contradicts .* goes on with prefix_projection false"),
    ):
        with pytest.raises(UserError, match=said):
            settled(model_arguments(base, tmp_path, **values))


def test_a_published_checkpoint_says_how_the_prefix_goes_on(published, reference_models):
    base, checkpoint, _ = published
    encoder = create_adapter(base, make_arguments(adapter_name_or_path=str(checkpoint))).prompt_encoder["default"]
    width = encoder.transform[0].out_features if hasattr(encoder, "transform") else None
    folder = Path(base.config.name_or_path)
    assert settled(model_arguments(folder, checkpoint)) == (5, width is not None, width)
    with pytest.raises(UserError, match=f"prefix_projection {str(width is None).lower()} contradicts"):
        settled(model_arguments(folder, checkpoint, prefix_projection=width is None))


def test_in_prediction_the_length_alone_can_contradict(reference_models, tmp_path):
    base = reference_models / "chatglm2-6b"
    create_adapter(load_base(base), make_arguments(prefix_projection=True)).save_pretrained(tmp_path)
    assert settled(model_arguments(base, tmp_path, prefix_projection=True), is_trainable=False)[0] == 4
    with pytest.raises(UserError, match="--num_virtual_tokens 5 contradicts"):
        settled(model_arguments(base, tmp_path, num_virtual_tokens=5), is_trainable=False)


def test_another_width_of_the_projection_is_refused(reference_models):
    base = reference_models / "chatglm-6b"
    arguments = {"prefix_projection": True, "encoder_hidden_size": 7}
    with pytest.raises(UserError, match="--encoder_hidden_size 7 contradicts"):
        settled(model_arguments(base, base / "ptuning-prefix_projection", **arguments))


def test_sizes_of_another_base_are_refused_before_the_base_is_loaded(reference_models, tmp_path):
    create_adapter(load_base(reference_models / "chatglm-6b"), make_arguments()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="3 layers of width 64 .*has 3 layers of width 32"):
        settled(model_arguments(reference_models / "chatglm2-6b", tmp_path))
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(reference_models / "chatglm-6b" / "ptuning-prefix", checkpoint)
    with pytest.raises(UserError, match="trained on THUDM/chatglm-6b, of type chatglm, but .*chatglm2-6b is of glm"):
        settled(model_arguments(reference_models / "chatglm2-6b", checkpoint))
    (checkpoint / "config.json").unlink()
    with pytest.raises(UserError, match="has 384 parameters per virtual token, but .* needs 192"):
        settled(model_arguments(reference_models / "chatglm2-6b", checkpoint))


# Broken adapters


def spoil_weights(folder: Path, how: str) -> None:
    file = folder / "adapter_model.safetensors"
    weight = load_file(file)["prompt_embeddings"]
    if how == "missing":
        file.unlink()
    elif how == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "another name":
        save_file({"weights": weight}, file)
    elif how == "too short":
        save_file({"prompt_embeddings": weight[:-1].contiguous()}, file)
    elif how == "not finite":
        save_file({"prompt_embeddings": weight * float("inf")}, file)


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("how", ["missing", "cut short", "empty", "another name", "too short", "not finite"])
def test_spoilt_weights_of_an_adapter_are_refused(how, is_trainable, reference_models, tmp_path):
    base = load_base(reference_models / "chatglm2-6b")
    create_adapter(base, make_arguments()).save_pretrained(tmp_path)
    spoil_weights(tmp_path, how)
    with pytest.raises(
        UserError, match=f"(?s){tmp_path}.* (but no|is cut short|cannot be read|has the shape|holds NaN)"
    ):
        load_adapter(load_base(reference_models / "chatglm2-6b"), str(tmp_path), is_trainable)


def test_code_in_the_weights_of_an_adapter_is_refused_and_not_run(reference_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create_adapter(load_base(reference_models / "chatglm2-6b"), make_arguments()).save_pretrained(tmp_path)
    spoil_weights(tmp_path, "missing")
    torch.save({"prompt_embeddings": torch.zeros(4, 192), "x": Bomb()}, "adapter_model.bin")
    with pytest.raises(UserError, match="so it is not read and nothing in it is run: give"):
        load_adapter(load_base(reference_models / "chatglm2-6b"), str(tmp_path))
    assert not Path("exploded").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"peft_type": "NO_SUCH"}', '{"task_type": "CAUSAL_LM"}'])
def test_a_broken_adapter_config_is_named(text, reference_models, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
        load_adapter(load_base(reference_models / "chatglm2-6b"), str(tmp_path))


def test_an_adapter_without_its_weights_is_named(tmp_path):
    PrefixTuningConfig(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has an adapter_config\.json, but no adapter_model\.safetensors: copy all"):
        read_saved_adapter(str(tmp_path))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_model.bin"])
def test_a_file_in_the_place_of_a_folder_is_named(name, reference_models, tmp_path):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name} is a file, and a PEFT adapter or"):
        settled(model_arguments(reference_models / "chatglm2-6b", tmp_path / name))


def test_the_prefix_is_trained_in_float32_on_a_half_precision_base(reference_models):
    base = AutoModelForCausalLM.from_pretrained(reference_models / "chatglm2-6b", dtype=torch.bfloat16)
    model = create_adapter(base, make_arguments())
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert trained.keys() == {"prompt_encoder.default.embedding.weight"}
    assert {value.dtype for value in trained.values()} == {torch.float32}


def test_a_lora_adapter_is_loaded_and_continued(reference_models, tmp_path):
    folder = reference_models / "chatglm2-6b"
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(load_base(folder), config).save_pretrained(tmp_path)
    for is_trainable in (False, True):
        model = load_adapter(load_base(folder), str(tmp_path), is_trainable)
        assert any(value.requires_grad for value in model.parameters()) is is_trainable


@pytest.mark.parametrize(("spoilt", "told"), [("r", "size mismatch"), ("weights", "Found missing adapter keys")])
def test_a_lora_adapter_that_is_not_whole_is_refused_and_leaves_nothing_in_the_base(
    spoilt, told, reference_models, tmp_path
):
    base = load_base(reference_models / "chatglm2-6b")
    before = [name for name, _ in base.named_parameters()]
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(load_base(reference_models / "chatglm2-6b"), config).save_pretrained(tmp_path)
    if spoilt == "r":
        LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]).save_pretrained(tmp_path)
    else:
        save_file({"prompt_embeddings": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=told):
        load_adapter(base, str(tmp_path))
    assert [name for name, _ in base.named_parameters()] == before
