"""A document becomes a prefix: the command from documents to adapter, exact where it must be, and after kills."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launches import run_launch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from warm_starts import ENVIRONMENT, warm_python

from glm_peft.adapters.assembly import OpenedBase, open_base, put_trainable_adapter_on
from glm_peft.adapters.divergence_loss import divergence_from
from glm_peft.adapters.label_loss import replaced_loss
from glm_peft.arguments.distil import parse_distil_arguments
from glm_peft.arguments.training import TrainArguments
from glm_peft.distillation.comparison import compare_held_out
from glm_peft.distillation.lessons import Lessons, encode_lessons, hear_teacher, learning_from_conversations
from glm_peft.distillation.reading import Readers, encode_text, open_reader, plan_reading, split_text
from glm_peft.distillation.start import is_exact, resolve_length, spread, start_as_text
from glm_peft.errors import UserError
from glm_peft.prediction.evaluation import Answering, Scoring
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.training.teacher_values import keep_values

TEXT = "本店卖雪纺半身裙。价格是三百元。\n周一休息，其他日子九点开门！电话 55-1234。\n\n可以退货，七天之内。" * 2
QUESTIONS = ("裙子多少钱？", "周一开门吗？", "怎么退货？", "电话是多少？", "几点开门？")
GENERATIONS = ("chatglm2", "chatglm3", "glm4", "glm4_0414")


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("documents") / "shop.md"
    file.write_text(TEXT, encoding="utf-8")
    return file


def rows_about(num_texts: int = 1) -> list[dict]:
    """Conversations, about each text by turns."""
    answers = ("三百元，本店卖的", "休息", "七天之内可以退货", "55-1234", "九点")
    return [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "context": number % num_texts,
            "reference": None,
        }
        for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True))
    ]


def distilled(
    base_dir: Path, document: Path, output_dir: Path, *words: str
) -> tuple[OpenedBase, Lessons, Readers, PeftModel, TrainArguments, float]:
    """What the command has before its training, and the loss of all conversations then."""
    typed = ["--model_name_or_path", base_dir, "--document", document, "--output_dir", output_dir, "--use_cpu", "true"]
    distil_args, arguments = parse_distil_arguments([*map(str, typed), "--num_held_out", "3", *words])
    base = open_base(arguments.model, arguments.data, is_trainable=True)
    reading = plan_reading(base, document.read_text(encoding="utf-8"), distil_args)
    base = resolve_length(base, reading)
    arguments = learning_from_conversations(arguments.resolve(base.model_args, base.data_args))
    model = base.load_model()
    student = put_trainable_adapter_on(model, base, arguments.training)
    start_as_text(student, base, reading, distil_args)
    readers, lessons = Readers(base, model), Lessons(rows_about(len(reading.texts)), reading.texts, 3, output_dir)
    data = encode_lessons(lessons, base, arguments.data)
    values = hear_teacher(lessons, data, readers, distil_args, arguments.training)
    rows = [row for examples in data.examples.values() for row in examples]
    batch = TrainingCollator(base.tokenizer)(rows)
    with replaced_loss(model, divergence_from(values)), torch.no_grad():
        loss = student.eval()(**batch).loss.item()
    assert is_exact(base, reading) == ("--num_virtual_tokens" in words and base.config.model_type != "chatglm")
    return base, lessons, readers, student, arguments, loss


@pytest.mark.parametrize("generation", [*GENERATIONS, "chatglm"])
def test_a_prefix_as_long_as_the_document_is_the_document(generation, tiny_model_dirs, document, tmp_path):
    words = ["--num_virtual_tokens", "9999", "--max_new_tokens", "8"]
    base, lessons, readers, student, arguments, loss = distilled(
        tiny_model_dirs[generation], document, tmp_path, *words
    )
    scoring = Scoring.from_arguments(
        Answering(student, base.tokenizer, base.chat_format), arguments.training, arguments.data
    )
    ways = compare_held_out(lessons, readers, student, scoring).ways
    assert ways["prefix"].context_tokens == len(encode_text(base, TEXT)) == ways["document"].context_tokens
    if generation == "chatglm":  # whose prompt is read in both directions
        assert 0 < ways["prefix"].divergence < ways["neither"].divergence
    else:
        assert abs(loss) < 1e-6 and abs(ways["prefix"].divergence) < 1e-6 and ways["prefix"].same_answers == 1
        assert ways["neither"].divergence > 1e-3


def test_the_loss_by_the_likeliest_tokens_is_near_that_by_all(tiny_model_dirs, document, tmp_path):
    losses = {}
    for k in (0, 20, 400):
        words = ["--teacher_top_k", str(k), "--prefix_start", "chunks", "--prefix_init", "normal"]
        losses[k] = distilled(tiny_model_dirs["glm4_0414"], document, tmp_path / str(k), *words)[-1]
    assert 0 < losses[20] < losses[400] < losses[0] * (1 + 1e-4)  # tokens that are put together lose what differs


def test_a_text_that_is_too_long_is_read_in_parts_that_overlap(tiny_model_dirs, document, tmp_path, caplog):
    base, lessons, readers, student, *_ = distilled(
        tiny_model_dirs["chatglm3"], document, tmp_path, "--max_context_tokens", "60", "--num_frozen_tokens", "0"
    )
    assert len(lessons.texts) > 2 and "are taken in" in caplog.text
    assert all(len(encode_text(base, text)) <= 60 for text in lessons.texts)
    for text, following in zip(lessons.texts, lessons.texts[1:], strict=False):
        assert any(text.endswith(following[:size]) for size in range(1, len(following)))
    assert "".join(split_text(base, TEXT, 50)) == TEXT
    with pytest.raises(UserError, match="leave no room for the documents"):
        distilled(tiny_model_dirs["chatglm3"], document, tmp_path, "--max_source_length", "999999")


def test_a_reader_answers_as_the_base_that_is_given_all_the_tokens(tiny_model_dirs):
    for generation in GENERATIONS:
        base = open_base(distil_model_args(tiny_model_dirs[generation]))
        model = base.load_model()
        prompt = open_reader(base, model, TEXT).encode([{"role": "user", "content": QUESTIONS[0]}])
        ids = encode_text(base, TEXT)
        whole = model(torch.tensor([ids + prompt])).logits[0, len(ids) :]
        reader = open_reader(base, model, TEXT).answering.model
        inputs = {"attention_mask": torch.ones(1, len(prompt)), "position_ids": torch.arange(len(prompt))[None]}
        torch.testing.assert_close(reader(torch.tensor([prompt]), **inputs).logits[0], whole, rtol=1e-4, atol=1e-4)


def distil_model_args(folder: Path):
    return parse_distil_arguments(
        ["--model_name_or_path", str(folder), "--document", "d.md", "--output_dir", str(folder / "unused")]
    )[1].model


def test_the_teacher_of_chatglm_is_asked_as_its_reader_is(tiny_model_dirs, document, tmp_path, monkeypatch):
    seen = {}

    def see(folder, examples, *more):
        seen["ids"] = examples["input_ids"][0]
        return keep_values(folder, examples, *more)

    monkeypatch.setattr("glm_peft.distillation.lessons.keep_values", see)
    words = ["--system_text", "请简短回答。", "--prefix_init", "normal"]
    _, lessons, readers, *_ = distilled(tiny_model_dirs["chatglm"], document, tmp_path, *words)
    prompt = readers(lessons.texts[0]).encode(lessons.in_order[0]["messages"][:-1])
    assert seen["ids"][: len(prompt)] == prompt


def test_parts_come_from_all_over_the_text():
    ids = spread(list(range(1000)), 100)
    assert len(ids) == 100 and ids[:32] == list(range(32)) and ids[-1] > 960
    assert spread(list(range(40)), 8) == list(range(8))


# The command


def command(base: Path, document: Path, output_dir: Path, *words: str) -> list[str]:
    typed = ["--model_name_or_path", base, "--document", document, "--output_dir", output_dir, "--use_cpu", "true"]
    sizes = "--num_virtual_tokens 12 --num_conversations 24 --num_held_out 4 --chunk_tokens 60 --max_target_length 12"
    steps = "--max_steps 12 --save_steps 4 --per_device_train_batch_size 4 --per_device_eval_batch_size 4"
    return [warm_python(), "-m", "glm_peft.distil", *map(str, typed), *sizes.split(), *steps.split(), *words]


def run(words: list[str], until: Callable[[], bool] | None = None) -> str:
    """Run a command, and kill it once something holds; return what it said."""
    options = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    with subprocess.Popen(words, **options) as process:
        while until and process.poll() is None and not until():
            time.sleep(0.005)
        if until:
            process.kill()
        said = process.communicate()[0]
    assert until or process.returncode == 0, said
    return said


def test_killed_in_every_phase_or_shared_by_processes_it_is_the_same(tiny_model_dirs, document, tmp_path):
    base, whole, killed = tiny_model_dirs["chatglm3"], tmp_path / "whole", tmp_path / "killed"
    said = run(command(base, document, whole))
    assert "conversations: " in said and "document in context" in said
    moments = {
        "conversations": lambda: (killed / "conversations.jsonl").exists(),
        "teacher": lambda: (killed / "teacher" / "done.bin").exists(),
        "training": lambda: (killed / "checkpoint-4").exists(),
    }
    for moment in moments.values():
        run(command(base, document, killed), moment)
    run(command(base, document, killed))
    for name in ("conversations.jsonl", "adapter_model.safetensors", "teacher/log_probs.bin"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()

    several = tmp_path / "several"  # two processes, of half the batch each
    words = command(base, document, several, "--per_device_train_batch_size", "2")[3:]
    run_launch(tmp_path / "log", "glm_peft.distil", words)
    for name in ("conversations.jsonl", "teacher/log_probs.bin"):
        assert (several / name).read_bytes() == (whole / name).read_bytes()
    alone, shared = (
        load_file(folder / "adapter_model.safetensors")["prompt_embeddings"] for folder in (whole, several)
    )
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-4)

    record = json.loads((whole / "provenance.json").read_text(encoding="utf-8"))
    (told,) = record["documents"]
    assert told["file"] == "shop.md" and len(told["sha256"]) == 64 and TEXT[:8] not in json.dumps(record)
    assert TEXT[:8] not in (whole / "README.md").read_text(encoding="utf-8")
    config = json.loads((whole / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "PREFIX_TUNING" and config["num_virtual_tokens"] == 12
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), whole)
    with pytest.raises(AssertionError, match="is of another run, with digest of the documents"):
        other = tmp_path / "other.txt"
        other.write_text("别的文本。", encoding="utf-8")
        run(command(base, other, whole))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--document", "--document"),
        ("--peft_type lora", "cannot be a document"),
        ("--prefix_projection true", "cannot start as a document"),
        ("--test_file x.json", "is not read here"),
        ("--validation_split 0.1", "--validation_split 0.1 is not read here"),
        ("--train_file a.json:1,b.json:2", "is a mixture, and questions are in one file"),
        ("--predict_with_generate true", "has no meaning here"),
        ("--weight_decay 0.1", "would shrink the frozen tokens"),
        ("--num_held_out 0", "--num_held_out must be at least 1"),
        ("--teacher_top_k -1", "--teacher_top_k must be 0 or more"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_read(words, message, tmp_path):
    typed = f"--model_name_or_path base --output_dir {tmp_path}".split()
    given = [] if words == "--document" else ["--document", "d.md", *words.split()]
    with pytest.raises(UserError, match=message):
        parse_distil_arguments([*typed, *given])


def test_documents_given_one_by_one_are_all_read(tmp_path):
    typed = f"--model_name_or_path base --output_dir {tmp_path} --document a.md --document b.md c.md".split()
    assert parse_distil_arguments(typed)[0].document == ["a.md", "b.md", "c.md"]
