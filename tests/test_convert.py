"""Published checkpoints to adapters and back, from the command line."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from glm_peft.adapters.loading import load_adapter
from glm_peft.adapters.published_checkpoints import read_published_prefix, read_published_sizes
from glm_peft.convert import main

NAME = "transformer.prefix_encoder."
NAMES = ["chatglm-6b", "chatglm2-6b", "chatglm3-6b"]


@pytest.fixture(params=[(name, tag) for name in NAMES for tag in ("prefix", "prefix_projection")], ids="-".join)
def published(request, reference_models):
    """A base and its published checkpoint."""
    name, tag = request.param
    return reference_models / name, reference_models / name / f"ptuning-{tag}"


def convert(direction, source, base, output_dir, *flags) -> None:
    main([direction, str(source), "--base", str(base), "--output_dir", str(output_dir), *flags])


def test_an_imported_adapter_is_what_loading_the_checkpoint_gives(published, tmp_path):
    base, checkpoint = published
    convert("import", checkpoint, base, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = load_adapter(model, str(checkpoint)).prompt_encoder["default"].embedding.weight
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert found.keys() == {"prompt_embeddings"}
    torch.testing.assert_close(found["prompt_embeddings"], expected, atol=0, rtol=0)
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(tmp_path))
    torch.testing.assert_close(loaded.prompt_encoder["default"].embedding.weight, expected, atol=0, rtol=0)


def test_verifying_compares_the_logits(published, tmp_path, caplog):
    base, checkpoint = published
    with caplog.at_level("INFO", "glm_peft.convert"):
        convert("import", checkpoint, base, tmp_path, "--verify")
    assert "the logits differ by at most" in caplog.text


def test_verifying_finds_keys_that_were_not_rotated(reference_models, tmp_path, monkeypatch, capsys):
    base = reference_models / "chatglm2-6b"
    monkeypatch.setattr("glm_peft.convert.rotate_prefix_keys", lambda weight, config, positions=None: weight)
    with pytest.raises(SystemExit):
        convert("import", base / "ptuning-prefix", base, tmp_path, "--verify")
    assert "gives logits that differ" in capsys.readouterr().err


def test_verifying_an_export_compares_the_logits_too(reference_models, tmp_path, monkeypatch, caplog, capsys):
    base = reference_models / "chatglm2-6b"
    convert("import", base / "ptuning-prefix", base, tmp_path / "adapter")
    with caplog.at_level("INFO", "glm_peft.convert"):
        convert("export", tmp_path / "adapter", base, tmp_path / "checkpoint", "--verify")
    assert "the logits differ by at most" in caplog.text
    monkeypatch.setattr("glm_peft.convert.rotate_prefix_keys", lambda weight, config, positions=None: weight)
    with pytest.raises(SystemExit):
        convert("export", tmp_path / "adapter", base, tmp_path / "checkpoint", "--verify")
    assert "gives logits that differ" in capsys.readouterr().err


def test_a_merge_cannot_be_verified(reference_models, tmp_path, capsys):
    base = reference_models / "chatglm2-6b"
    assert "leave it out of merge" in refusal(
        capsys, "merge", tmp_path / "adapter", base, tmp_path / "out", "--verify"
    )


def test_export_after_import_gives_the_checkpoint_back(published, tmp_path):
    base, checkpoint = published
    convert("import", checkpoint, base, tmp_path / "adapter")
    convert("export", tmp_path / "adapter", base, tmp_path / "checkpoint")
    expected, found = read_published_prefix(checkpoint), read_published_prefix(tmp_path / "checkpoint")
    assert_close(found.weight, expected.weight)
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config | {"pre_seq_len": 5, "prefix_projection": False} == config
    assert {name: config[name] for name in ("model_type", "num_layers")} == {"model_type": "chatglm", "num_layers": 3}


def refusal(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The one sentence with which a conversion ends; it has written nothing."""
    output_dir = Path(words[3])
    with pytest.raises(SystemExit) as stopped:
        convert(*words)
    assert stopped.value.code == 2
    assert not output_dir.exists() or not list(output_dir.iterdir())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_prefix_of_another_base_is_refused(reference_models, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(reference_models / "chatglm-6b" / "ptuning-prefix", checkpoint)
    (checkpoint / "config.json").unlink()
    error = refusal(capsys, "import", checkpoint, reference_models / "chatglm2-6b", tmp_path / "out")
    assert "has 384 parameters per virtual token, but" in error


# Other sizes and seeds

GLM_SHAPES = [
    # layers, heads, groups, size of a head, virtual tokens, rope_ratio
    (1, 4, 1, 4, 1, None),
    (2, 4, 4, 8, 7, None),
    (3, 8, 2, 16, 128, 50),
    (5, 6, 3, 12, 33, 500),
    (28, 2, 2, 8, 200, None),
]
CHATGLM_SHAPES = [(1, 2, 1, 4, 1, None), (3, 4, 4, 8, 64, None), (28, 2, 2, 16, 13, None)]


def write_base(folder: Path, generation: str, shape: tuple) -> Path:
    """The config of a base of this shape, as published; its weights are not looked at."""
    layers, heads, groups, size, _, rope_ratio = shape
    config = {"model_type": "chatglm", "num_layers": layers, "num_attention_heads": heads, "hidden_size": heads * size}
    if generation == "chatglm":
        config |= {"_name_or_path": "THUDM/chatglm-6b", "position_encoding_2d": True, "inner_hidden_size": 64}
    else:
        config |= {"_name_or_path": f"THUDM/{generation}-6b", "multi_query_group_num": groups, "kv_channels": size}
        config |= {"ffn_hidden_size": 64, "padded_vocab_size": 260, "seq_length": 512, "layernorm_epsilon": 1e-5}
        config |= {"rope_ratio": rope_ratio} if rope_ratio else {}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_encoder(generation: str, shape: tuple, projection: bool, seed: int) -> dict[str, torch.Tensor]:
    """Random parameters under the published names (FORMATS section 6)."""
    layers, heads, groups, size, length, _ = shape
    generator = torch.Generator().manual_seed(seed)
    hidden, width = heads * size, layers * 2 * size * (heads if generation == "chatglm" else groups)
    sizes = {"embedding.weight": (length, hidden if projection and generation == "chatglm" else width)}
    if projection:
        sizes |= {"trans.0.weight": (hidden, sizes["embedding.weight"][1]), "trans.0.bias": (hidden,)}
        sizes |= {"trans.2.weight": (width, hidden), "trans.2.bias": (width,)}
    encoder = {name: torch.randn(*shape, generator=generator) for name, shape in sizes.items()}
    return {name: value / value.shape[-1] ** 0.5 if "trans" in name else value for name, value in encoder.items()}


def write_checkpoint(folder: Path, encoder: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    torch.save({NAME + name: value for name, value in encoder.items()}, folder / "pytorch_model.bin")
    return folder


def flat_prefix(encoder: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the published code makes of the parameters."""
    flat = encoder["embedding.weight"].float()
    if "trans.0.weight" not in encoder:
        return flat
    hidden = torch.nn.functional.linear(flat, encoder["trans.0.weight"].float(), encoder["trans.0.bias"].float())
    return torch.nn.functional.linear(
        hidden.tanh(), encoder["trans.2.weight"].float(), encoder["trans.2.bias"].float()
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("projection", [False, True], ids=["flat", "projected"])
@pytest.mark.parametrize(
    "generation, shape",
    [
        *[(generation, shape) for generation in ("chatglm2", "chatglm3") for shape in GLM_SHAPES],
        *[("chatglm", shape) for shape in CHATGLM_SHAPES],
    ],
)
def test_import_and_export_are_the_identity_for_every_size(generation, shape, projection, seed, tmp_path):
    base, encoder = write_base(tmp_path / "base", generation, shape), make_encoder(generation, shape, projection, seed)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", encoder)
    convert("import", checkpoint, base, tmp_path / "adapter")
    convert("export", tmp_path / "adapter", base, tmp_path / "exported")
    convert("import", tmp_path / "exported", base, tmp_path / "again")
    exported = torch.load(tmp_path / "exported" / "pytorch_model.bin", weights_only=True)
    assert exported.keys() == {NAME + "embedding.weight"}
    expected = read_published_prefix(checkpoint).weight
    assert_close(expected, flat_prefix(encoder))
    assert_close(exported[NAME + "embedding.weight"], expected)
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again")]
    assert_close(adapters[0], adapters[1])
    is_rotated = not torch.allclose(adapters[0]["prompt_embeddings"], expected, atol=1e-3)
    assert is_rotated == (generation != "chatglm")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["pytorch_model.bin", "model.safetensors", "old pickle"])
def test_other_precisions_and_forms_are_read(dtype, form, tmp_path):
    base, encoder = (
        write_base(tmp_path / "base", "chatglm2", GLM_SHAPES[1]),
        make_encoder("chatglm2", GLM_SHAPES[1], True, 0),
    )
    encoder = {name: value.to(dtype) for name, value in encoder.items()}
    named = {NAME + name: value for name, value in encoder.items()}
    (tmp_path / "checkpoint").mkdir()
    if form == "model.safetensors":
        save_file(named, tmp_path / "checkpoint" / form)
    else:
        file = tmp_path / "checkpoint" / "pytorch_model.bin"
        torch.save(named, file, _use_new_zipfile_serialization=form != "old pickle")
    convert("import", tmp_path / "checkpoint", base, tmp_path / "adapter")
    convert("export", tmp_path / "adapter", base, tmp_path / "exported")
    found = read_published_prefix(tmp_path / "exported").weight
    assert found.dtype == torch.float32
    assert_close(found, flat_prefix(encoder))


# Whole models and shards

SHAPE = (2, 4, 2, 8, 3, None)


@pytest.fixture
def place(tmp_path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base, a checkpoint for it, and the parameters in that."""
    encoder = make_encoder("chatglm2", SHAPE, True, 0)
    base, checkpoint = write_base(tmp_path / "base", "chatglm2", SHAPE), write_checkpoint(tmp_path / "ckpt", encoder)
    return base, checkpoint, encoder


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]], index: str) -> None:
    save = save_file if index.startswith("model.safetensors") else torch.save
    for name, state in shards.items():
        save(state, folder / name)
    weight_map = {name: shard for shard, state in shards.items() for name in state}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_of_a_sharded_whole_model_only_the_shards_with_the_prefix_are_opened(suffix, place, tmp_path):
    _, checkpoint, encoder = place
    (checkpoint / "pytorch_model.bin").unlink()
    names = [f"part-{number}.{suffix}" for number in (1, 2, 3)]
    parts = list(encoder.items())
    shards = {
        names[0]: {"transformer.embedding.weight": torch.ones(2)},
        names[1]: {NAME + name: value for name, value in parts[:2]} | {"transformer.a": torch.ones(1)},
        names[2]: {NAME + name: value for name, value in parts[2:]},
    }
    index = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[suffix] + ".index.json"
    write_shards(checkpoint, shards, index)
    (checkpoint / names[0]).unlink()
    assert_close(read_published_prefix(checkpoint).weight, flat_prefix(encoder))


class WatchedFile:
    """A safetensors file that remembers which of its tensors were read."""

    read: list[str] = []

    def __init__(self, *words: object) -> None:
        self.file = safe_open(*words)

    def __enter__(self) -> "WatchedFile":
        return self

    def __exit__(self, *words: object) -> None:
        pass

    def keys(self) -> list[str]:
        return self.file.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return self.file.get_tensor(name)


def test_of_a_whole_model_only_the_prefix_is_read(place, monkeypatch):
    _, checkpoint, encoder = place
    state = {NAME + name: value for name, value in encoder.items()} | {"transformer.big": torch.ones(1000)}
    torch.save(state, checkpoint / "pytorch_model.bin")
    mapped, load = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda *words, **options: mapped.append(options["mmap"]) or load(*words, **options)
    )
    assert_close(read_published_prefix(checkpoint).weight, flat_prefix(encoder))
    assert mapped and all(mapped)  # so that the operating system reads what is used
    save_file(state, checkpoint / "model.safetensors")
    monkeypatch.setattr("glm_peft.models.weight_files.safe_open", WatchedFile)
    assert_close(read_published_prefix(checkpoint).weight, flat_prefix(encoder))
    assert sorted(WatchedFile.read) == sorted(NAME + name for name in encoder)


def test_the_sizes_of_a_prefix_are_told_without_its_numbers(reference_models, place):
    _, checkpoint, _ = place
    assert read_published_sizes(checkpoint) == (3, 64, None)  # not PEFT's form: it goes on flat
    folder = reference_models / "chatglm-6b"
    weight = read_published_prefix(folder / "ptuning-prefix").weight
    assert read_published_sizes(folder / "ptuning-prefix") == (*weight.shape, None)
    assert read_published_sizes(folder / "ptuning-prefix_projection") == (*weight.shape, 64)


# Hostile and broken checkpoints


class Reduced:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def with_code(folder: Path) -> None:
    torch.save(
        {NAME + "embedding.weight": torch.zeros(3, 64), "x": Reduced(folder / "run")}, folder / "pytorch_model.bin"
    )


def with_code_in_a_bare_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Reduced(folder / "run")}))


def with_code_in_a_shard(folder: Path) -> None:
    (folder / "pytorch_model.bin").unlink()
    write_shards(
        folder, {"a.bin": {NAME + "embedding.weight": Reduced(folder / "run")}}, "pytorch_model.bin.index.json"
    )


@pytest.mark.parametrize("spoil", [with_code, with_code_in_a_bare_pickle, with_code_in_a_shard])
def test_code_is_refused_and_not_run(spoil, place, tmp_path, capsys):
    base, checkpoint, _ = place
    spoil(checkpoint)
    error = refusal(capsys, "import", checkpoint, base, tmp_path / "out")
    assert "is not a file of plain tensors (UnpicklingError), so it is not read and nothing in it is run" in error
    assert not (checkpoint / "run").exists()


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("form", ["pytorch_model.bin", "old pickle", "model.safetensors"])
def test_a_file_that_is_cut_short_is_named(form, share, place, tmp_path, capsys):
    base, checkpoint, encoder = place
    named, file = {NAME + name: value for name, value in encoder.items()}, checkpoint / "pytorch_model.bin"
    if form == "old pickle":
        torch.save(named, file, _use_new_zipfile_serialization=False)
    elif form == "model.safetensors":
        file = checkpoint / form
        save_file(named, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    error = refusal(capsys, "import", checkpoint, base, tmp_path / "out")
    assert f"{file} is cut short or broken" in error or f"{file} is not a file of plain tensors" in error


def change(**changes: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Other tensors in the places of some, with _ for the points of a name; none where `None`."""
    named = {name.replace("_", "."): value for name, value in changes.items()}
    return lambda encoder: {name: value for name, value in (encoder | named).items() if value is not None}


@pytest.mark.parametrize(
    "spoil, said",
    [
        (change(embedding_weight=torch.zeros(64)), "do not fit together"),
        (change(embedding_weight=torch.zeros(0, 64)), "do not fit together"),
        (change(embedding_weight=torch.zeros(3, 63)), "do not fit together"),
        (change(trans_0_bias=torch.zeros(5)), "do not fit together"),
        (change(trans_2_weight=torch.zeros(64, 5)), "do not fit together"),
        (change(trans_2_bias=torch.zeros(1, 64)), "do not fit together"),
        (change(trans_2_bias=None), "missing or unknown: transform.2.bias"),
        (change(trans_0_weight=None, trans_0_bias=None), "missing or unknown: transform.0.bias, transform.0.weight"),
        (change(trans_4_weight=torch.zeros(64, 64)), "missing or unknown: transform.4.weight"),
        (change(embedding_weight=None), "holds no P-Tuning v2 prefix"),
        (change(embedding_weight=torch.zeros(3, 64, dtype=torch.int8)), "not a tensor of floating-point numbers"),
        (change(embedding_weight="text"), "not a tensor of floating-point numbers but str"),
        (change(embedding_weight=torch.full((3, 64), torch.nan)), "NaN or infinite values (in embedding.weight)"),
        (change(trans_0_weight=torch.full((32, 64), torch.inf)), "infinite values (in transform.0.weight)"),
        (lambda encoder: {"embedding.weight": torch.zeros(3, 32)}, "has 32 parameters per virtual token"),
    ],
)
def test_other_parameters_than_a_prefix_has_are_refused(spoil, said, place, tmp_path, capsys):
    base, checkpoint, encoder = place
    named = {NAME + name: value for name, value in spoil(encoder).items()}
    torch.save(named, checkpoint / "pytorch_model.bin")
    assert said in refusal(capsys, "import", checkpoint, base, tmp_path / "out")


@pytest.mark.parametrize("content", [[torch.zeros(3, 64)], torch.zeros(3, 64), {3: torch.zeros(3, 64)}])
def test_a_file_of_something_else_has_no_prefix(content, place, tmp_path, capsys):
    base, checkpoint, _ = place
    torch.save(content, checkpoint / "pytorch_model.bin")
    assert "has no config.json with a model_type" in refusal(capsys, "import", checkpoint, base, tmp_path / "out")


@pytest.mark.parametrize(
    "index, said",
    [
        (json.dumps({"weight_map": {NAME + "embedding.weight": "a.bin"}}), "a.bin is not there: copy"),
        (json.dumps({"weight_map": {NAME + "embedding.weight": "../a.bin"}}), "a file of another folder (../a.bin)"),
        (json.dumps({"weight_map": {NAME + "embedding.weight": "/a/b.bin"}}), "a file of another folder (/a/b.bin)"),
        (json.dumps({"weight_map": {NAME + "embedding.weight": 3}}), "is no index of shards"),
        ('{"weight_map": {"a.weight": "a.bin"}}', "has no config.json with a model_type"),
        ('{"weight_map": ', "is no index of shards"),
        ("[]", "is no index of shards"),
        ("{}", "is no index of shards"),
    ],
)
def test_a_broken_index_is_named(index, said, place, tmp_path, capsys):
    base, checkpoint, _ = place
    (checkpoint / "pytorch_model.bin").rename(checkpoint / "pytorch_model.bin.index.json").write_text(index)
    assert said in refusal(capsys, "import", checkpoint, base, tmp_path / "out")


def test_folders_that_are_no_checkpoint_are_named(place, tmp_path, capsys):
    base, checkpoint, _ = place
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for source, said in (
        (tmp_path / "empty", "empty is an empty folder, and a published P-Tuning v2 checkpoint is wanted: "),
        (tmp_path / "nothing", f"CHECKPOINT {tmp_path / 'nothing'} is not there, and"),
        (
            checkpoint / "pytorch_model.bin",
            f"pytorch_model.bin is a file, and a published P-Tuning v2 checkpoint is wanted: give {checkpoint}.",
        ),
        (tmp_path / "adapter", f"--adapter_name_or_path takes {tmp_path / 'adapter'}."),
    ):
        assert said in refusal(capsys, "import", source, base, tmp_path / "out")


def test_only_a_whole_prefix_adapter_is_exported(reference_models, tmp_path, capsys):
    base = reference_models / "chatglm2-6b"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(model, lora).save_pretrained(tmp_path / "lora")
    assert "is a LORA adapter: only a prefix" in refusal(capsys, "export", tmp_path / "lora", base, tmp_path / "out")
    convert("import", base / "ptuning-prefix", base, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "is cut short or broken" in refusal(capsys, "export", tmp_path / "adapter", base, tmp_path / "out")


def test_a_base_whose_files_do_not_say_its_generation_is_named_by_the_chat_format(tmp_path, capsys):
    base = write_base(tmp_path / "base", "chatglm3", GLM_SHAPES[2])
    config = json.loads((base / "config.json").read_text()) | {"_name_or_path": "mine"}
    (base / "config.json").write_text(json.dumps(config))
    checkpoint = write_checkpoint(tmp_path / "ckpt", make_encoder("chatglm3", GLM_SHAPES[2], False, 0))
    assert "(--chat_format on the command line)" in refusal(capsys, "import", checkpoint, base, tmp_path / "out")
    convert("import", checkpoint, base, tmp_path / "out", "--chat_format", "chatglm3")
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["chat_format"] == "chatglm3"
