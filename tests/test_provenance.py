"""What an adapter records of its training, and what is said of a base that is not its own."""

import getpass
import hashlib
import importlib.metadata
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from make_tiny_model import make_tiny_model
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PrefixTuningConfig
from safetensors.torch import save_file
from tiny_options import GENERATIONS
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from glm_peft import convert, doctor, predict, train
from glm_peft.adapters import assembly
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.models.loading import find_generation
from glm_peft.provenance.fingerprints import describe_config, digest_tokenizer, sample_weights
from glm_peft.provenance.ownership import (
    claim_folder,
    digest_weights,
    find_foreign,
    refuse_adapter,
    set_aside_results,
    state_origin,
)
from glm_peft.provenance.recipe import public_name
from glm_peft.provenance.record import describe_base, read_provenance, write_provenance
from glm_peft.publishing.card.build import build_card, write_card
from glm_peft.publishing.files import collect_files, describe_commit
from glm_peft.reporting.file_names import (
    CURVES_NAME,
    PREDICT_RESULTS_NAME,
    PREDICTIONS_NAME,
    PROVENANCE_NAME,
    RESULTS_NAME,
)
from glm_peft.reporting.results import save_results

SIZES = {"hidden_size": 32}
TRAINING = "--do_train --max_steps 1 --save_steps 1 --num_virtual_tokens 4 --use_cpu true --disable_tqdm true"
SECRET = "hf_ThisTokenIsNobodys"


class Place:
    """A folder with a base, rows, and an adapter that was trained there."""

    def __init__(self, folder: Path, base: Path, *words: str) -> None:
        self.folder, self.base, self.rows, self.adapter = folder, base, folder / "rows.json", folder / "adapter"
        rows = [{"content": f"第{i}问", "summary": "答" * (i + 1)} for i in range(6)]
        self.rows.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        self.train(self.adapter, *words)

    def train(self, output_dir: Path, *words: str, base: Path | None = None) -> None:
        command = ["--model_name_or_path", str(base or self.base), "--output_dir", str(output_dir)]
        command += ["--train_file", str(self.rows), *TRAINING.split(), *words]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", *command])
            patch.setenv("HF_TOKEN", SECRET)
            train.main()

    def predict(self, base: Path, *words: str, adapter: Path | None = None) -> None:
        command = ["--model_name_or_path", str(base), "--adapter_name_or_path", str(adapter or self.adapter)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["predict", *command, "--prompt", "问", "--max_new_tokens", "2", *words])
            predict.main()


@pytest.fixture(scope="module")
def place(tiny_model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    words = ["--do_eval", "--validation_file", str(folder / "rows.json"), "--max_train_samples", "5"]
    return Place(folder, tiny_model_dirs["chatglm2"], *words, "--prefix_dropout", "0.1")


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What this package warned of."""
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.levelname == "WARNING" and record.name.startswith("glm_peft")
    ]


def copy_of(folder: Path, target: Path, **changes: object) -> Path:
    """A copy of a base with other fields in its config.json."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8")) | changes
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def without_names(folder: Path, target: Path) -> Path:
    """A copy of a base whose files do not say which generation it is."""
    copy_of(folder, target, _name_or_path="")
    file = target / "tokenizer_config.json"
    tokenizer_config = json.loads(file.read_text(encoding="utf-8")) | {"name_or_path": ""}
    file.write_text(json.dumps(tokenizer_config), encoding="utf-8")
    return target


def record_of(folder: Path) -> dict:
    return json.loads((folder / PROVENANCE_NAME).read_text(encoding="utf-8"))


def rewrite(folder: Path, target: Path, text: str) -> Path:
    """A copy of an adapter with another record."""
    shutil.copytree(folder, target)
    (target / PROVENANCE_NAME).write_text(text, encoding="utf-8")
    return target


# What is recorded


def test_the_record_says_what_the_run_was(place):
    record, results = record_of(place.adapter), json.loads((place.adapter / "all_results.json").read_text())
    file = {"file": "rows.json", "sha256": hashlib.sha256(place.rows.read_bytes()).hexdigest()}
    trained_on = record["data"]["train"]
    assert record["data"] == {"train": trained_on, "validation": file | {"rows": 6}}
    assert trained_on == file | {"rows": 5, "rows_sha256": trained_on["rows_sha256"]}
    assert (record["chat_format"], record["metric_protocol"]) == ("chatglm2", "thudm")
    assert record["base"]["name"] == place.base.name and record["base"]["generation"] == "chatglm2"
    expected = {"num_virtual_tokens": 4, "max_steps": 1, "max_train_samples": 5, "prefix_dropout": 0.1, "seed": 42}
    assert {name: record["recipe"].get(name) for name in expected} == expected
    assert record["scores"]["eval_loss"] == results["eval_loss"]
    for package in ("peft", "transformers", "torch", "glm_peft"):
        assert record["versions"][package] == importlib.metadata.version(package)


def test_the_record_holds_no_path_no_user_and_no_token(place):
    def texts(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            for name, item in value.items():
                yield from (name, *texts(item))
        elif isinstance(value, list):
            for item in value:
                yield from texts(item)
        elif isinstance(value, str):
            yield value

    found = list(texts(record_of(place.adapter)))
    assert "rows.json" in found
    assert [text for text in found if "/" in text or "\\" in text or text == getpass.getuser()] == []
    assert not any(SECRET in text or str(Path.home()) in text or str(place.folder) in text for text in found)


def test_a_checkpoint_has_the_record_too(place):
    record, finished = record_of(place.adapter / "checkpoint-1"), record_of(place.adapter)
    assert {name for name in finished if record[name] != finished[name]} == {"scores", "measured", "stretches"}
    (there,), (here,) = record["stretches"], finished["stretches"]
    assert there | {"seconds": here["seconds"]} == here
    assert (here["start"], here["steps"], here["data"]) == ("new", [0, 1], finished["data"]["train"])
    assert finished["measured"]["seconds"]["train"] == here["seconds"]


def test_a_run_that_goes_on_names_what_it_went_on_from(place, tmp_path):
    place.train(tmp_path, "--adapter_name_or_path", str(place.adapter))
    digest = hashlib.sha256((place.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    expected = {"name": "adapter", "sha256": {"adapter_model.safetensors": digest}}
    record = record_of(tmp_path)
    assert record["continued_from"] == expected
    assert [stretch["start"] for stretch in record["stretches"]] == ["new", "adapter"]
    assert record["stretches"][0] == record_of(place.adapter)["stretches"][0]
    assert "last stretch of training alone" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "command repeats the run" in (place.adapter / "README.md").read_text(encoding="utf-8")


def test_stock_peft_loads_the_adapter_as_if_the_record_were_not_there(place, tmp_path):
    def load(folder: Path) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            PeftConfig.from_pretrained(folder)
            AutoPeftModelForCausalLM.from_pretrained(folder)
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place.base), folder)
        return [str(warning.message) for warning in caught]

    shutil.copytree(place.adapter, tmp_path / "bare")
    (tmp_path / "bare" / PROVENANCE_NAME).unlink()
    load(tmp_path / "bare")  # some warnings come once only
    assert load(place.adapter) == load(tmp_path / "bare")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("THUDM/chatglm2-6b", "THUDM/chatglm2-6b"),
        ("/home/somebody/models/chatglm2-6b/", "chatglm2-6b"),
        ("../somebody/chatglm2-6b", "chatglm2-6b"),
        ("~/chatglm2-6b", "chatglm2-6b"),
        ("/cache/models--THUDM--chatglm2-6b/snapshots/" + 40 * "a", "THUDM/chatglm2-6b"),
        ("C:\\Users\\somebody\\chatglm2-6b", "chatglm2-6b"),
        ("\\\\host\\share\\chatglm2-6b", "chatglm2-6b"),
    ],
)
def test_of_a_folder_only_the_name_is_told(name, expected):
    assert public_name(name) == expected


def test_the_commit_of_a_copy_of_the_hubs_is_told():
    config = AutoConfig.for_model("glm4")
    config.name_or_path = "/cache/models--zai-org--GLM-4-9B-0414/snapshots/" + 40 * "a"
    base = describe_base(config, "glm4")
    assert (base["name"], base["revision"]) == ("zai-org/GLM-4-9B-0414", 40 * "a")


# Whose results they are


def with_results(folder: Path, weights: float) -> Path:
    """An adapter's folder with all that a run on these weights leaves."""
    folder.mkdir()
    save_weights(folder, weights)
    PrefixTuningConfig(num_virtual_tokens=1, task_type="CAUSAL_LM", base_model_name_or_path="x/y").save_pretrained(
        folder
    )
    (folder / CURVES_NAME).write_bytes(b"curves")
    origin = state_origin(digest_weights(folder), {"test": {"file": "asked.json", "rows": 1}}, "test")
    save_results({"eval_loss": 1.5}, folder / RESULTS_NAME, origin)
    save_results({"predict_rouge-1": 94.83}, folder / PREDICT_RESULTS_NAME, origin)
    (folder / PREDICTIONS_NAME).write_text('{"prompt": "问", "labels": "答", "predict": "旧"}\n', encoding="utf-8")
    write_provenance(folder, {"data": {"train": {"file": "old.json", "rows": 3}}})
    write_card(folder)
    return folder


def save_weights(folder: Path, weights: float) -> None:
    save_file({"prompt_embeddings": torch.tensor([[weights]])}, folder / "adapter_model.safetensors")


OF_A_RUN = {PROVENANCE_NAME, RESULTS_NAME, PREDICT_RESULTS_NAME, PREDICTIONS_NAME, CURVES_NAME}


def test_card_and_push_take_only_what_is_of_the_weights(tmp_path, warned):
    folder = with_results(tmp_path / "folder", 1.0)
    assert find_foreign(folder) == [] and describe_commit(folder, "x/y").endswith("rouge-1 94.83 (predict)")
    assert all(text in build_card(folder) for text in ("旧", "94.83", "old.json", "asked.json", CURVES_NAME))
    save_weights(folder, 2.0)  # as by PEFT or by hand
    assert set(find_foreign(folder)) == OF_A_RUN and describe_commit(folder, "x/y") == "Adapter for x/y"
    card = build_card(folder)
    assert not any(text in card for text in ("旧", "94.83", "old.json", "asked.json", f"]({CURVES_NAME})"))
    assert set(collect_files(folder, "x/y")) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert any("are not of the weights there: the card leaves them out" in message for message in warned())


@pytest.mark.parametrize(
    "name, change, foreign",
    [
        (PREDICT_RESULTS_NAME, {"weights_sha256": None}, {PREDICT_RESULTS_NAME, PREDICTIONS_NAME}),
        (PREDICT_RESULTS_NAME, None, {PREDICTIONS_NAME}),
        (RESULTS_NAME, {"weights_sha256": "0" * 64}, {RESULTS_NAME}),
        (PROVENANCE_NAME, {"curves_sha256": "0" * 64}, {CURVES_NAME}),
        (PROVENANCE_NAME, {"curves_sha256": None}, {CURVES_NAME}),
        (PROVENANCE_NAME, None, set()),
    ],
)
def test_what_does_not_state_these_weights_is_foreign(name, change, foreign, tmp_path):
    file = with_results(tmp_path / "folder", 1.0) / name
    if change is None:
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert set(find_foreign(tmp_path / "folder")) == foreign


def test_what_an_earlier_version_left_counts_until_other_weights_are_written(tmp_path):
    folder = with_results(tmp_path / "folder", 1.0)
    for name in (PROVENANCE_NAME, RESULTS_NAME, PREDICT_RESULTS_NAME):
        known = json.loads((folder / name).read_text())
        kept = {key: value for key, value in known.items() if key not in ("weights_sha256", "curves_sha256")}
        (folder / name).write_text(json.dumps(kept))
    assert find_foreign(folder) == []
    former = digest_weights(folder)
    assert set_aside_results(folder, former) == former and (folder / RESULTS_NAME).is_file()
    save_weights(folder, 2.0)
    set_aside_results(folder, former)
    assert {file.name for file in (folder / f"former_{former[:8]}").iterdir()} == OF_A_RUN | {"README.md"}
    assert not OF_A_RUN & {file.name for file in folder.iterdir()}


def test_results_are_not_written_beside_other_weights(tmp_path):
    folder, other = with_results(tmp_path / "folder", 1.0), with_results(tmp_path / "other", 2.0)
    base = ModelArguments("x/y")
    assert claim_folder(folder, ModelArguments("x/y", adapter_name_or_path=str(folder))) == digest_weights(folder)
    assert claim_folder(tmp_path, base) is None
    for model_args in (base, ModelArguments("x/y", adapter_name_or_path=str(other))):
        with pytest.raises(UserError, match=f"--output_dir {folder} has other weights than those that answer here"):
            claim_folder(folder, model_args)
    with pytest.raises(UserError, match="has an adapter, and a whole model beside it"):
        refuse_adapter(folder)


def test_a_second_run_in_a_folder_says_so_before_and_keeps_the_results_of_the_first_apart(
    place, tmp_path, warned, capsys
):
    folder = shutil.copytree(place.adapter, tmp_path / "folder")
    (folder / PREDICT_RESULTS_NAME).write_text('{"predict_rouge-1": 94.83}')
    place.train(folder, "--learning_rate", "0.1")
    before, after = warned()
    assert "starts afresh: its weights are replaced when this one ends (another --output_dir keeps them); " in before
    assert f"{PREDICT_RESULTS_NAME} of those before went to {folder / 'former_'}" in after
    assert find_foreign(folder) == [] and "94.83" not in (folder / "README.md").read_text(encoding="utf-8")
    assert record_of(folder)["weights_sha256"] == digest_weights(folder) != digest_weights(place.adapter)
    evaluation = ["--do_train", "false", "--do_eval", "--validation_file", str(place.rows)]
    assert "other weights than those that answer" in refusal(capsys, lambda: place.train(folder, *evaluation))
    place.train(folder, *evaluation, "--adapter_name_or_path", str(folder))
    assert find_foreign(folder) == [] and "eval_loss" in json.loads((folder / RESULTS_NAME).read_text())


# Fingerprints


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_base_is_known_again_elsewhere_saved_by_transformers_and_in_another_precision(
    generation, tiny_model_dirs, tmp_path
):
    folder = tiny_model_dirs[generation]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert describe_config(config) == describe_config(AutoConfig.from_pretrained(folder))
    assert digest_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "saved")) == digest_tokenizer(tokenizer)
    moved = copy_of(folder, tmp_path / "moved", transformers_version="4.30.2", torch_dtype="float16")
    assert describe_config(AutoConfig.from_pretrained(moved)) == describe_config(config)
    arguments = [ModelArguments(str(path)) for path in (folder, tmp_path / "saved", moved)]
    assert {find_generation(one) for one in arguments} == {generation.removesuffix("_0414")}


@pytest.mark.parametrize("change", [{"rope_ratio": 50}, {"seq_length": 64}, {"layernorm_epsilon": 1e-6}])
def test_other_numbers_in_a_config_are_another_config(change, tiny_model_dirs, tmp_path):
    changed = copy_of(tiny_model_dirs["chatglm3"], tmp_path / "changed", **change)
    configs = [AutoConfig.from_pretrained(folder) for folder in (tiny_model_dirs["chatglm3"], changed)]
    assert describe_config(configs[0]) != describe_config(configs[1])


def test_every_generation_has_a_tokenizer_of_its_own(tiny_model_dirs):
    digests = {digest_tokenizer(AutoTokenizer.from_pretrained(folder)) for folder in tiny_model_dirs.values()}
    assert len(digests) >= len(tiny_model_dirs) - 1  # glm4_0414 has that of glm4


def test_one_other_token_is_another_tokenizer(tiny_model_dirs, tmp_path):
    folder = copy_of(tiny_model_dirs["glm4_0414"], tmp_path / "base")
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = saved["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    swapped = {"other" + last if token == last else token: index for token, index in vocabulary.items()}
    merges = [pair for pair in saved["model"]["merges"] if "".join(pair) != last]
    saved["model"] |= {"vocab": swapped, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (folder, tiny_model_dirs["glm4_0414"])]
    assert len({digest_tokenizer(tokenizer) for tokenizer in tokenizers}) == 2


def test_quantized_weights_are_not_sampled():
    layer = torch.nn.Linear(4, 4)
    layer.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert sample_weights(layer).keys() == {"bias"}


# Other bases


def test_on_its_own_base_nothing_is_said_wherever_that_lies(place, tmp_path, warned):
    place.predict(place.base)
    place.predict(copy_of(place.base, tmp_path / "moved", torch_dtype="float16"), "--dtype", "bfloat16")
    assert warned() == []


def refusal(capsys: pytest.CaptureFixture, command: Callable[[], None]) -> str:
    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("generation", ["chatglm", "chatglm3", "glm4", "glm4_0414"])
def test_another_generation_is_refused_in_a_sentence_that_names_both(
    generation, place, tiny_model_dirs, tmp_path, capsys
):
    other = tiny_model_dirs[generation]
    exported = ["export", str(place.adapter), "--base", str(other), "--output_dir", str(tmp_path / "export")]
    going_on = ["--adapter_name_or_path", str(place.adapter)]
    for command in (
        lambda: place.predict(other),
        lambda: place.train(tmp_path / "out", *going_on, base=other),
        lambda: convert.main(exported),
    ):
        error = refusal(capsys, command)
        assert f"{place.adapter} was trained on {place.base.name}, of the generation chatglm2, but {other} is" in error
    assert not (tmp_path / "export").exists()


def test_the_doctor_says_it_too(place, tiny_model_dirs, tmp_path, capsys, monkeypatch):
    words = ["--adapter_name_or_path", str(place.adapter), "--train_file", str(place.rows)]
    monkeypatch.setattr(sys, "argv", ["doctor", "--model_name_or_path", str(tiny_model_dirs["chatglm3"]), *words])
    with pytest.raises(SystemExit) as stop:
        doctor.main()
    assert stop.value.code == 1
    assert "was trained on chatglm2, of the generation chatglm2, but" in capsys.readouterr().out


def test_another_architecture_of_the_same_generation_is_refused(tiny_model_dirs, tmp_path, capsys):
    place = Place(tmp_path, tiny_model_dirs["glm4"])
    error = refusal(capsys, lambda: place.predict(tiny_model_dirs["glm4_0414"]))
    assert "trained on glm4, of type glm, but" in error and "is of glm4" in error


def test_other_weights_are_refused_unless_they_are_allowed(place, tmp_path, warned, capsys):
    other = make_tiny_model(tmp_path / "other", "chatglm2", seed=1, **SIZES)
    error = refusal(capsys, lambda: place.predict(other))
    assert f"was trained on {place.base.name}, and {other} has other weights" in error
    assert "--allow_other_base" in error
    place.predict(other, "--allow_other_base")
    (warning,) = warned()
    assert f"was trained on {place.base.name}, and {other} has other weights" in warning


def test_another_config_is_warned_about(place, tmp_path, warned):
    other = copy_of(place.base, tmp_path / "other", seq_length=64)
    place.predict(other)
    (warning,) = warned()
    assert f"trained on {place.base.name}, and the config of {other} differs" in warning
    assert "max_position_embeddings 32768 there, 64 here" in warning


def test_another_tokenizer_is_warned_about(place, tmp_path, warned):
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(f"完全不同的文字{chr(0x4E00 + i)}{chr(0x5E00 + i)}" for i in range(300)), encoding="utf-8"
    )
    made = make_tiny_model(tmp_path / "made", "chatglm2", tokenizer_text=str(text), **SIZES)
    other = copy_of(place.base, tmp_path / "other")
    shutil.copy(made / "tokenizer.model", other / "tokenizer.model")
    place.predict(other)
    (warning,) = warned()
    assert f"with the tokenizer of {place.base.name}, and that of {other} gives other ids" in warning


# Chat formats


def test_another_chat_format_is_warned_about(place, warned):
    place.predict(place.base, "--chat_format", "plain")
    (warning,) = warned()
    assert "was trained with --chat_format chatglm2, and plain is given" in warning


def test_the_recorded_chat_format_is_taken_where_none_is_given(tiny_model_dirs, tmp_path, warned, monkeypatch):
    base = without_names(tiny_model_dirs["chatglm3"], tmp_path / "base")
    place = Place(tmp_path, base, "--chat_format", "plain")
    chosen = []
    get_chat_format = assembly.get_chat_format
    monkeypatch.setattr(
        assembly, "get_chat_format", lambda *words: chosen.append(get_chat_format(*words)) or chosen[-1]
    )
    place.predict(base)
    assert [chat_format.name for chat_format in chosen] == ["plain"]
    assert warned() == []


def test_the_chat_format_tells_the_generation_where_the_files_do_not(tiny_model_dirs, tmp_path, capsys):
    base = without_names(tiny_model_dirs["chatglm2"], tmp_path / "base")
    place = Place(tmp_path, base, "--chat_format", "chatglm2")
    assert record_of(place.adapter)["base"]["generation"] == "chatglm2"
    place.predict(base)
    assert "of the generation chatglm2" in refusal(capsys, lambda: place.predict(tiny_model_dirs["chatglm3"]))


# Adapters without a record, or with a broken one


def test_of_an_adapter_of_stock_peft_only_the_bases_name_is_known(place, tiny_model_dirs, tmp_path, warned):
    shutil.copytree(place.adapter, tmp_path / "stock")
    (tmp_path / "stock" / PROVENANCE_NAME).unlink()
    place.predict(tiny_model_dirs["chatglm3"], adapter=tmp_path / "stock")
    assert len(warned()) == 1  # the folder of the base is called chatglm2
    config = json.loads((tmp_path / "stock" / "adapter_config.json").read_text())
    (tmp_path / "stock" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "mine"}))
    place.predict(tiny_model_dirs["chatglm3"], adapter=tmp_path / "stock")
    assert len(warned()) == 1


def test_a_published_checkpoint_of_another_generation_is_warned_about(reference_models, tmp_path, warned):
    checkpoint, base = reference_models / "chatglm2-6b" / "ptuning-prefix", reference_models / "chatglm3-6b"
    convert.main(["import", str(checkpoint), "--base", str(base), "--output_dir", str(tmp_path)])
    (warning,) = warned()
    assert "trained on THUDM/chatglm2-6b, of the generation chatglm2, but" in warning and "of chatglm3" in warning


def test_a_published_checkpoint_whose_config_has_other_numbers_is_warned_about(reference_models, tmp_path, warned):
    checkpoint = copy_of(reference_models / "chatglm3-6b" / "ptuning-prefix", tmp_path / "checkpoint", rope_ratio=50)
    base = reference_models / "chatglm3-6b"
    convert.main(["import", str(checkpoint), "--base", str(base), "--output_dir", str(tmp_path / "adapter")])
    (warning,) = warned()
    assert "rope_theta 500000.0 there, 10000.0 here" in warning


@pytest.mark.parametrize("text", ["", '{"base": ', "\x00\x01"])
def test_a_broken_record_is_named_and_the_adapter_used(text, place, tmp_path, warned):
    place.predict(place.base, adapter=rewrite(place.adapter, tmp_path / "broken", text))
    assert warned() and all(f"{PROVENANCE_NAME} in {tmp_path / 'broken'} cannot be read" in one for one in warned())


@pytest.mark.parametrize(
    "record",
    [
        [],
        {"base": "chatglm2"},
        {"base": {"name": 3, "generation": [], "config": "x", "weights_sample": {"model.norm.weight": "x"}}},
        {"base": {"tokenizer_sha256": 1, "weights_sample": [1]}, "chat_format": {}},
    ],
)
def test_a_record_of_other_things_says_nothing(record, place, tmp_path, warned):
    place.predict(place.base, adapter=rewrite(place.adapter, tmp_path / "odd", json.dumps(record)))
    assert warned() == []


def test_an_adapter_on_the_hub_without_a_record_has_none():
    assert read_provenance("somebody/adapter") == {}


# Import


def test_an_imported_adapter_records_its_base_and_its_source(reference_models, tmp_path):
    checkpoint, base = reference_models / "chatglm2-6b" / "ptuning-prefix", reference_models / "chatglm2-6b"
    convert.main(["import", str(checkpoint), "--base", str(base), "--output_dir", str(tmp_path)])
    record = record_of(tmp_path)
    digest = hashlib.sha256((checkpoint / "pytorch_model.bin").read_bytes()).hexdigest()
    assert record["converted_from"] == {"name": "ptuning-prefix", "sha256": {"pytorch_model.bin": digest}}
    assert record["base"]["generation"] == "chatglm2"
    assert record["base"]["config"] == describe_config(AutoConfig.from_pretrained(base))
