"""What is kept of the base: measured by its own answers to general prompts, held by a second loss, resumed exactly."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from short_runs import NEEDED, assert_same_end, log_of, run, training_words
from transformers import AutoModelForCausalLM

from glm_peft import inspect_adapter
from glm_peft.adapters.assembly import attach_for_training, open_base
from glm_peft.adapters.divergence_loss import take_likeliest
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.training import TrainingArguments, parse_train_arguments
from glm_peft.errors import UserError
from glm_peft.models.unwrapping import base_of
from glm_peft.prediction.evaluation import Answering
from glm_peft.preprocessing.batching import Batching
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.publishing.card.build import build_card
from glm_peft.training import keeping as module
from glm_peft.training.keeping import LIKELIEST, Keeping, hear_base, read_general_prompts
from glm_peft.training.kept_log import _log_keeping
from glm_peft.training.trainer import PrefixTrainer

MEASURES = ("keep_divergence", "keep_same_answers", "keep_loss_rise")
PROMPTS = ["你好", "白色的裙", "写一首诗", "Hello", "1+1", "再见", "谢谢"]


@pytest.fixture(scope="module")
def keep_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("keep") / "general.jsonl"
    rows = [{"prompt": prompt} for prompt in PROMPTS] + [{"prompt": "早", "response": "this is not read"}]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def hear(tiny_model_dirs, keep_file, tmp_path_factory):
    """What is kept by a model of one method, whose adapter is new."""

    def hear(config) -> Keeping:
        folder = tiny_model_dirs["glm4_0414"]
        base = open_base(ModelArguments(str(folder)))
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
        attach_for_training(model, TrainingArguments(output_dir="unused", use_cpu=True))
        prompts = read_general_prompts(base, str(keep_file), 100)
        answering = Answering(model, base.tokenizer, base.chat_format)
        return hear_base(prompts, answering, tmp_path_factory.mktemp("heard"), 3, {})

    return hear


@pytest.fixture(scope="module")
def with_prefix(hear) -> Keeping:
    torch.manual_seed(0)
    return hear(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def test_an_adapter_that_does_nothing_keeps_all(hear):
    # LoRA begins as a product with zero; its layers are switched off for the base, and on again.
    kept = hear(LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    assert kept.measure() == {
        "keep_divergence": pytest.approx(0, abs=1e-7),
        "keep_same_answers": 1,
        **{MEASURES[2]: 0},
    }
    torch.nn.init.normal_(
        kept.answering.model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    )
    assert kept.measure()["keep_divergence"] > 1e-3


def test_the_divergence_is_that_of_the_full_logits_and_of_every_other_prompt(with_prefix):
    model, total, rise, count = with_prefix.answering.model, 0.0, 0.0, 0
    for row in with_prefix.examples.select(range(0, len(PROMPTS) + 1, 2)):
        numbers = [label for label in row["labels"] if label != -100]
        prompt = len(row["labels"]) - len(numbers)
        ids, targets = torch.tensor([row["input_ids"]]), with_prefix.tokens[numbers, None]
        positions = torch.arange(ids.shape[1])[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
        with torch.no_grad():
            both = [each(**inputs).logits[0, prompt - 1 : -1].log_softmax(-1) for each in (base_of(model), model)]
        chosen, wanted = take_likeliest(both[0], LIKELIEST)
        others = (1 - both[1].exp().gather(-1, chosen).sum(-1, keepdim=True)).log()
        compared = torch.cat([both[1].gather(-1, chosen), others], -1)
        total += (wanted.exp() * (wanted - compared)).sum().item()
        rise += (both[0] - both[1]).gather(-1, targets).sum().item()
        count += len(numbers)
    found = with_prefix.measure()
    assert found["keep_divergence"] == pytest.approx(total / count, rel=1e-4)
    assert found["keep_loss_rise"] == pytest.approx(rise / count, rel=1e-4)
    assert 0 <= found["keep_same_answers"] < 1


def test_batches_of_the_second_loss_go_around_the_prompts_that_are_not_measured(with_prefix, monkeypatch):
    monkeypatch.setattr(Keeping, "_collate", lambda self, rows: rows)
    drawn = [with_prefix.draw_batch(number, 2, seed=1) for number in range(4)]
    first, second = sum(drawn[:2], []), sum(drawn[2:], [])
    assert sorted(first) == sorted(second) == [1, 3, 5, 7]
    assert first != second or first != sorted(first)
    assert with_prefix.draw_batch(3, 2, seed=1) == drawn[3]  # by its number alone


def test_the_second_loss_adds_its_gradient_and_leaves_the_loss_as_it_is(with_prefix, tmp_path):
    settings = {"use_cpu": True, "per_device_train_batch_size": 2, "keep_file": "x", "keep_weight": 3, "keep_every": 2}
    args, model = TrainingArguments(output_dir=str(tmp_path), **settings), with_prefix.answering.model
    examples = with_prefix.examples.remove_columns("labels").add_column("labels", with_prefix.examples["input_ids"][:])
    collator = TrainingCollator(with_prefix.answering.tokenizer)
    trainer = PrefixTrainer(model, args, batching=Batching(examples, "random", collator, ""), keeping=with_prefix)
    batch, weight = collator([examples[0], examples[2]]), model.prompt_encoder["default"].embedding.weight

    def step(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        trainer.state.global_step = number
        loss = trainer.compute_loss(model.train(), batch, num_items_in_batch=torch.tensor(10))
        return loss.detach(), torch.autograd.grad(loss, weight)[0]

    (loss, with_both), again, (plain_loss, plain) = step(2), step(2), step(3)
    (kept,) = torch.autograd.grad(with_prefix.divergence(model, with_prefix.draw_batch(1, 2, args.seed)), weight)
    assert_close(with_both, plain + 3 * 2 * kept)
    assert_close(again[1], plain)  # once in a step, however many batches it accumulates
    assert_close(loss, plain_loss)


def test_the_share_of_the_second_loss_is_told_of_packed_rows_too(with_prefix, tmp_path, caplog):
    settings = {"use_cpu": True, "keep_file": "x", "keep_weight": 3, "keep_every": 2}
    packed = Dataset.from_dict({"input_ids": [[1] * 60, [1] * 20]})
    with caplog.at_level("INFO"):
        _log_keeping(
            with_prefix, TrainingArguments(output_dir=str(tmp_path), **settings), Batching(packed, "", None, "")
        )
    kept = with_prefix.mean_length() / 2
    assert f"{100 * kept / (40 + kept):.0f} % of the tokens" in caplog.text


@pytest.fixture(scope="module")
def trained(tiny_model_dirs, keep_file, tmp_path_factory) -> tuple[list[str], Path]:
    """The words of a run that keeps, and its output folder."""
    folder = tmp_path_factory.mktemp("kept") / "out"
    words = training_words(tiny_model_dirs["chatglm2"], folder, "--keep_file", str(keep_file), "--keep_weight", "2")
    words += [
        "--keep_every",
        "2",
        "--max_steps",
        "6",
        "--save_steps",
        "3",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "3",
    ]
    words += ["--load_best_model_at_end", "--metric_for_best_model", "keep_divergence", "--prefix_dropout", "0.1"]
    run(words)
    return words, folder


def test_a_training_tells_what_it_keeps_before_meanwhile_and_after(trained):
    words, folder = trained
    results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    assert {f"{when}_{name}" for when in ("start", "eval") for name in MEASURES} <= results.keys()
    history = log_of(folder / "checkpoint-6")
    found = [(entry["step"], entry["eval_keep_divergence"]) for entry in history if "eval_keep_divergence" in entry]
    assert [step for step, _ in found] == [0, 3, 6]
    assert results["start_keep_divergence"] == found[0][1]
    best = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))
    assert best["best_metric"] == min(value for _, value in found[1:])  # the least is the best
    assert results["eval_keep_divergence"] == pytest.approx(best["best_metric"], rel=1e-4)
    for language, title in (("en", "What it keeps of the base"), ("zh", "保留了多少基座的能力")):
        card = build_card(folder, language=language)
        assert f"## {title}" in card
        assert f"{results['start_keep_divergence']:.4f} | {results['eval_keep_divergence']:.4f} |" in card


def test_a_finished_adapter_is_measured_as_in_training(trained, tiny_model_dirs, keep_file, tmp_path, capsys):
    _, folder = trained
    words = ["--base", str(tiny_model_dirs["chatglm2"]), "--keep_file", str(keep_file), "--output_dir", str(tmp_path)]
    inspect_adapter.main([str(folder), *words, "--per_device_eval_batch_size", "6"])
    results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    found = json.loads((tmp_path / "inspection.json").read_text(encoding="utf-8"))["kept"]
    assert found == pytest.approx({name: results[f"eval_{name}"] for name in MEASURES}, rel=1e-4)
    assert f"{found['keep_divergence']:.4f}" in capsys.readouterr().out


def test_a_stopped_run_ends_as_one_that_was_not_and_the_base_answers_once(trained, tmp_path, monkeypatch):
    words, expected = trained
    folder = tmp_path / "out"
    shutil.copytree(expected, folder)
    shutil.rmtree(folder / "checkpoint-6")
    monkeypatch.setattr(module, "_answer", _for_adapters_alone(module._answer))
    place = words.index("--output_dir") + 1
    run([*words[:place], str(folder), *words[place + 1 :], "--resume_from_checkpoint", "last"])
    assert_same_end(folder, expected, "checkpoint-6")


def _for_adapters_alone(answer):
    def checked(answering, prompts):
        assert len(prompts) < len(PROMPTS)  # the base would be asked all
        return answer(answering, prompts)

    return checked


def test_builtin_prompts_are_two_hundred_half_of_them_chinese(tiny_model_dirs):
    base = open_base(ModelArguments(str(tiny_model_dirs["glm4_0414"])))
    lines = module._GENERAL_PROMPTS.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    assert len(read_general_prompts(base, "builtin", 256)) == len(set(prompts)) == 200
    for part in (prompts[::2], prompts[1::2]):  # those that are measured, and the others
        assert sum(any("\u4e00" <= sign <= "\u9fff" for sign in prompt) for prompt in part) in range(48, 58)


@pytest.mark.parametrize(
    "more, said",
    [
        ("--keep_weight -1 --keep_file builtin", "--keep_weight must be 0 or more, found -1"),
        ("--keep_every 0 --keep_file builtin --keep_weight 1", "--keep_every must be at least 1"),
        ("--max_keep_samples 1 --keep_file builtin", "--max_keep_samples must be 2 or more"),
        ("--eval_strategy epoch --early_stopping_patience 2 --metric_for_best_model keep_divergence", "generated"),
    ],
)
def test_what_cannot_be_kept_is_refused(more, said):
    with pytest.raises(UserError, match=said):
        parse_train_arguments([*NEEDED, *more.split()])


def test_one_prompt_and_a_base_that_is_trained_itself_are_refused(tiny_model_dirs, keep_file):
    base = open_base(ModelArguments(str(tiny_model_dirs["glm4_0414"])))
    with pytest.raises(UserError, match="has one prompt: give two or more"):
        read_general_prompts(base, str(keep_file), 1)
    missing = keep_file.with_name("missing.jsonl")
    with pytest.raises(UserError, match=f"--keep_file {missing}: there is no such file"):
        read_general_prompts(base, str(missing), 100)
    arguments = parse_train_arguments([*NEEDED, "--keep_file", "builtin"])
    with pytest.raises(UserError, match="--keep_file compares an adapter with the base under it"):
        arguments.resolve(replace(arguments.model, peft_type="none", num_virtual_tokens=None), arguments.data)
