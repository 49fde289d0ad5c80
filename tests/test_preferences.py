"""Answers preferred and rejected: read from every form, learnt by their log-ratios to the base, resumed exactly."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from data_fakes import END, CharacterFormat, CharacterTokenizer, make_data_args, text_of
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from short_runs import NEEDED, assert_same_end, run
from transformers import AutoModelForCausalLM

from glm_peft.adapters.assembly import open_base
from glm_peft.adapters.other_methods import place_virtual_tokens
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.training import DataArguments, TrainingArguments, parse_train_arguments
from glm_peft.data import build_generation_features, build_training_features
from glm_peft.errors import UserError
from glm_peft.models.unwrapping import base_of
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.preprocessing.example_description import describe_example
from glm_peft.preprocessing.split_loading import load_splits
from glm_peft.training.preference import REWARDS
from glm_peft.training.trainer import PrefixTrainer


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED, CHOSEN, REJECTED = said("user", "q"), said("assistant", "a"), said("assistant", "b")
ROW = {"prompt": "q", "chosen": "a", "rejected": "b"}
WHOLE = {"chosen": [ASKED, CHOSEN], "rejected": [ASKED, REJECTED]}
SHAREGPT = {name: {"from": "gpt", "value": text} for name, text in (("chosen", "a"), ("rejected", "b"))}


FLAGS = (
    "--objective dpo --dpo_beta 0.5 --num_virtual_tokens 4 --prefix_projection --prefix_dropout 0.1 --use_cpu true "
)
FLAGS += "--learning_rate 0.01 --max_steps 6 --per_device_train_batch_size 1 --gradient_accumulation_steps 2 "
FLAGS += "--per_device_eval_batch_size 2 --logging_steps 2 --save_steps 3 --eval_strategy steps --eval_steps 3 "
FLAGS += (
    "--activation_checkpointing --load_best_model_at_end --metric_for_best_model rewards/margins --do_train --do_eval"
)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The conversations of rows in a file, here called rows.jsonl."""
    monkeypatch.chdir(tmp_path)

    def load(*rows: object, split: str = "train", **flags: object):
        Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        data_args = make_data_args(**({f"{split}_file": "rows.jsonl", "objective": "dpo"} | flags))
        return load_splits(data_args, [split])[split]

    return load


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {**ROW, "prompt": [ASKED], "chosen": [CHOSEN], "rejected": [REJECTED]},
        {**ROW, "prompt": json.dumps([ASKED]), "chosen": json.dumps([CHOSEN])},  # as CSV has it
        {"instruction": "q", "input": "", "chosen": "a", "rejected": [REJECTED]},
        {"conversations": [{"from": "human", "value": "q"}], **SHAREGPT},
        WHOLE,
        {"prompt": "q", "messages": [ASKED, CHOSEN], **WHOLE},
    ],
)
def test_every_form_gives_the_question_with_both_answers(load, caplog, row):
    caplog.set_level(logging.INFO, logger="glm_peft")
    [conversation] = load(row)
    assert (conversation.messages, conversation.rejected) == ([ASKED, CHOSEN], (REJECTED,))
    assert "'chosen', 'rejected' as answers preferred and rejected" in caplog.text
    [told] = load({**row, "system": "s"})
    assert told.messages == [said("system", "s"), ASKED, CHOSEN]


def test_history_and_tools_stand_before_both_answers(load):
    earlier = [said("user", "q0"), said("assistant", "a0")]
    [conversation] = load({**ROW, "history": [["q0", "a0"]]})
    assert conversation.trained_turns("all", list) == [([*earlier, ASKED], [answer]) for answer in (CHOSEN, REJECTED)]
    call = {"role": "assistant", "metadata": "f", "content": "{}"}
    [conversation] = load({"messages": [ASKED], "tools": [{"name": "f"}], "chosen": call, "rejected": "b"})
    assert [m["role"] for m in conversation.prompt] == ["tools", "user"]
    assert conversation.answer_messages == [call]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "chosen": "a"}, ": there is no column 'rejected'"),
        ({"prompt": "q", "response": "a"}, ": there is no column 'chosen'"),
        ({**ROW, "rejected": "a"}, ", 'chosen' and 'rejected' have the same answer"),
        ({**ROW, "rejected": " "}, ", column 'rejected': the assistant content of message 2 is empty"),
        ({**ROW, "chosen": None}, ", column 'chosen' must hold text or messages, found null"),
        ({**ROW, "chosen": "[{"}, ", column 'chosen': this text is not JSON"),
        ({"chosen": "a", "rejected": "b"}, ", column 'chosen' has an answer, and no column its question"),
        ({**WHOLE, "rejected": [said("user", "p"), REJECTED]}, ", 'chosen' and 'rejected' are conversations that dif"),
        ({"prompt": "p", **WHOLE}, ", column 'chosen': the conversation does not begin as 'prompt' does"),
        ({**WHOLE, "chosen": [ASKED, CHOSEN, ASKED]}, ", column 'chosen': the last message must be the assistant's"),
    ],
)
def test_what_is_no_pair_is_told_with_its_line(load, row, told):
    with pytest.raises(UserError) as error:
        load(row)
    assert str(error.value).startswith(f"rows.jsonl, line 1{told}")
    if "there is no" not in told:
        assert len(load(ROW, row, skip_bad_rows=True) if "prompt" in row else "1") == 1


def test_pairs_are_not_half_read_without_the_flag(load):
    for row in (ROW, WHOLE, {"messages": [ASKED], **SHAREGPT}):
        with pytest.raises(UserError, match="line 1: 'chosen' and 'rejected' are answers .*: give --objective dpo"):
            load(row, objective="sft")
    flags = {"prompt_column": "prompt", "response_column": "chosen"}
    with pytest.raises(UserError, match="line 1: there is no column 'ask', .*--prompt_column"):
        load(ROW, prompt_column="ask")
    [named] = load(ROW, objective="sft", **flags)
    assert (named.messages, named.rejected) == ([ASKED, CHOSEN], ())
    [answered] = load({"messages": [ASKED, CHOSEN], "chosen": "x", "rejected": "y"}, objective="sft")
    assert answered.messages == [ASKED, CHOSEN]


def test_the_chosen_answer_is_the_reference_of_a_test(load):
    split = load(ROW, split="test", objective="sft")
    features = build_generation_features(split, CharacterFormat(), CharacterTokenizer(), make_data_args())
    assert (features.prompts, features.references) == (["q"], ["a"])


def test_an_example_is_both_answers_to_one_prompt(load):
    data_args, tokenizer = make_data_args(objective="dpo"), CharacterTokenizer()
    pairs, report = build_training_features(
        load(ROW, {**ROW, "chosen": "aa"}), CharacterFormat(), tokenizer, data_args
    )
    assert [[text_of(ids) for ids in both] for both in pairs["input_ids"]] == [["q>a.", "q>b."], ["q>aa.", "q>b."]]
    assert pairs["length"][:] == [4, 5]
    assert (report.examples, [lengths.percentiles[-1] for lengths in report.lengths]) == (2, [2, 3])
    assert describe_example(tokenizer, pairs[0]).count("4 tokens, 2 of them carry loss") == 2
    batch = TrainingCollator(tokenizer, ignore_pad_token_for_loss=False)([pairs[0], pairs[1]])
    assert batch["labels"].tolist()[0] == [[-100, -100, -100, ord("a"), END], [-100, -100, -100, ord("b"), END]]
    assert {name: tuple(values.shape) for name, values in batch.items()} == dict.fromkeys(batch, (2, 2, 5))


def test_an_answer_is_not_cut(load, caplog):
    formats, data_args = (
        (CharacterFormat(), CharacterTokenizer()),
        make_data_args(objective="dpo", max_target_length=2),
    )
    with pytest.raises(UserError, match="rows.jsonl, line 2: --max_target_length 2 would cut an answer of 3 tokens"):
        build_training_features(load(ROW, {**ROW, "rejected": "bb"}), *formats, data_args)
    data_args.skip_bad_rows = True
    pairs, report = build_training_features(load({**ROW, "rejected": "bb"}, ROW), *formats, data_args)
    assert (report.examples, [text_of(ids) for ids in pairs[0]["input_ids"]]) == (1, ["q>a.", "q>b."])
    assert "Left out, with an answer above --max_target_length 2: 1 pairs." in caplog.text


METHODS = {
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p_tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "lora": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False),
}


@pytest.mark.parametrize("method", METHODS)
def test_loss_gradient_and_rewards_are_those_of_the_full_logits(method, tiny_model_dirs, load, tmp_path):
    """As published: -log sigmoid(beta ((log p - log q) of the chosen - of the rejected)), with q of the bare base."""
    folder = tiny_model_dirs["glm4_0414"]
    base = open_base(ModelArguments(str(folder)), DataArguments(objective="dpo"))
    split = load({**ROW, "chosen": "白色的裙，很好看"}, {**ROW, "prompt": "一条白色的裤", "chosen": "黑色"})
    pairs, _ = build_training_features(split, base.chat_format, base.tokenizer, base.data_args)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), METHODS[method])
    if method == "p_tuning":
        place_virtual_tokens(model)
    args = TrainingArguments(str(tmp_path), use_cpu=True, dpo_beta=0.3)
    sets, collator = {"one": pairs.select([0]), "both": pairs}, TrainingCollator(base.tokenizer)
    trainer = PrefixTrainer(model, args, data_collator=collator, eval_dataset=sets, learns_pairs=True, joins_sets=True)
    batch = collator([pairs[0], pairs[1]])
    found = trainer.compute_loss(model.train(), batch)
    weights = [value for value in model.parameters() if value.requires_grad]
    gradients = torch.autograd.grad(found, weights)

    own = log_probs(model, pairs)
    with torch.no_grad():
        if method == "lora":
            with model.disable_adapter():
                reference = log_probs(model, pairs)
        else:
            reference = log_probs(base_of(model), pairs)
    rewards = 0.3 * (own - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    expected = (1 + (-margins).exp()).log().mean()
    assert_close(found, expected)
    assert_close(dict(enumerate(gradients)), dict(enumerate(torch.autograd.grad(expected, weights))))
    trainer.preference.count_last()
    assert_close(trainer.prediction_step(model.eval(), batch, prediction_loss_only=True)[0], expected.detach())
    means = [*rewards.mean(0).tolist(), margins.mean().item(), (margins > 0).float().mean().item()]
    assert trainer.preference.take(is_training=True) == pytest.approx(dict(zip(REWARDS, means, strict=True)), abs=1e-6)
    trainer.preference.take(is_training=False)
    measured = trainer.evaluate()
    for name, mean in zip(REWARDS, means, strict=True):
        assert measured[f"eval_both_{name}"] == pytest.approx(mean, abs=1e-6)
        together = (measured[f"eval_one_{name}"] + 2 * mean) / 3  # of three pairs
        assert measured[f"eval_{name}"] == pytest.approx(together, abs=1e-6)


def log_probs(model: torch.nn.Module, pairs: Dataset) -> torch.Tensor:
    """Of the answers [pairs, 2], each alone and without padding, from the full logits."""

    def log_prob(ids: list[int], labels: list[int]) -> torch.Tensor:
        ids, answer = torch.tensor([ids]), torch.tensor([label for label in labels if label != -100])
        positions = torch.arange(ids.shape[1])[None]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits[0]
        # From the end, as the virtual tokens of P-tuning have logits, too.
        return logits[-len(answer) - 1 : -1].log_softmax(-1).gather(-1, answer[:, None]).sum()

    each = [log_prob(*one) for pair in pairs for one in zip(pair["input_ids"], pair["labels"], strict=True)]
    return torch.stack(each).view(-1, 2)


@pytest.fixture(scope="module")
def trained(tiny_model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The words of a run on six pairs, evaluated on three, and its output folder."""
    folder = tmp_path_factory.mktemp("preferred")
    rows = [{"prompt": f"{number}?", "chosen": "很好看" * (number % 3 + 1), "rejected": "不"} for number in range(6)]
    for name, own in (("train", rows), ("validation", rows[:3])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, own)), encoding="utf-8")
    files = [f"--{name}_file={folder / name}.jsonl" for name in ("train", "validation")]
    words = ["--model_name_or_path", str(tiny_model_dirs["chatglm"]), "--output_dir", str(folder / "out"), *files]
    words += FLAGS.split()
    run(words)
    return words, folder / "out"


def test_rewards_are_logged_and_choose_the_best_checkpoint(trained):
    state = json.loads((trained[1] / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    evaluated = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    assert all({*REWARDS} <= entry.keys() for entry in logged)
    assert all({f"eval_{name}" for name in REWARDS} <= entry.keys() for entry in evaluated)
    assert state["best_metric"] == max(entry["eval_rewards/margins"] for entry in evaluated)
    for entry in logged:
        assert entry["rewards/margins"] == pytest.approx(entry["rewards/chosen"] - entry["rewards/rejected"], abs=1e-6)
        assert entry["rewards/accuracies"] * 4 == int(entry["rewards/accuracies"] * 4)  # of two steps of two pairs
    card = (trained[1] / "README.md").read_text(encoding="utf-8")
    assert "prefers the answers that are chosen there" in card and "loss, nats per pair of answers" in card
    assert (
        f"| pairs whose chosen answer has the higher reward, 0 to 1 | {evaluated[-1]['eval_rewards/accuracies']:.2f}"
        in card
    )


def test_a_resumed_run_ends_as_the_unbroken_one(trained, tmp_path):
    words, unbroken = trained
    shutil.copytree(unbroken / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    run([*words, "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "last"])
    assert_same_end(tmp_path / "out", unbroken, "checkpoint-6")  # with the rewards that were not logged yet


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--peft_type none", "--peft_type none changes the base, to which the answers are held by --objective dpo"),
        ("--packing", "--packing would take pairs apart"),
        ("--label_smoothing_factor 0.1", "--label_smoothing_factor is of another loss"),
        ("--dpo_beta 0", "--dpo_beta must be above 0, found 0.0."),
    ],
)
def test_what_pairs_cannot_have_is_refused(words, told):
    with pytest.raises(UserError, match=told):
        arguments = parse_train_arguments([*NEEDED, "--objective", "dpo", *words.split()])
        arguments.resolve(
            replace(arguments.model, peft_type=arguments.model.peft_type or "prefix_tuning"), arguments.data
        )
