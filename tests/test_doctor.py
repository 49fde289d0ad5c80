"""The command `python -m glm_peft.doctor`: what it says of a run, and its exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig
from warm_starts import warm_python

from glm_peft import doctor
from glm_peft.arguments.methods import METHODS
from glm_peft.examination.doctor_report import colour_example, format_histogram, shows_colour
from glm_peft.preprocessing import split_loading

PROJECT = Path(__file__).parents[1]
ROWS = [{"content": f"类型#裙*颜色#{number}", "summary": f"第{number}条裙子很美"} for number in range(10)]


class Visit:
    """Examines files in this process."""

    def __init__(self, base: Path, folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
        self.base, self.folder, self.capsys, self.monkeypatch = base, folder, capsys, monkeypatch

    def write(self, rows: list, name: str = "train.json") -> str:
        file = self.folder / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        file.write_text("\n".join(lines), encoding="utf-8")
        return str(file)

    def __call__(self, *words: str, base: Path | None = None) -> tuple[int, str]:
        """Exit code, and what was printed."""
        words = ("--model_name_or_path", str(base or self.base), "--num_virtual_tokens", "4", *words)
        self.monkeypatch.setattr(sys, "argv", ["doctor", *words])
        try:
            doctor.main()
            code = 0
        except SystemExit as exit:
            code = exit.code
        output = self.capsys.readouterr()
        return code, output.out + output.err


@pytest.fixture
def visit(tiny_model_dirs, tmp_path, capsys, monkeypatch) -> Visit:
    return Visit(tiny_model_dirs["chatglm2"], tmp_path, capsys, monkeypatch)


def test_a_good_run_is_told_in_full_and_leaves_with_0(visit: Visit):
    code, text = visit("--train_file", visit.write(ROWS), "--validation_file", visit.write(ROWS[:2], "dev.json"))
    assert code == 0
    assert "6 steps of 8 rows: 3 epochs of 10" in text and "usual" not in text
    assert "train: 10 rows read" in text and "validation: 2 rows read" in text
    assert "train prompts that are in validation too: 2; remove them from validation" in text
    assert re.search(r"^\d+ tokens, \d+ of them carry loss$", text, re.MULTILINE)
    assert "GPU of  8 GB: fits" in text
    assert text.endswith("\nTraining can start.\n")


def test_sources_are_examined_one_by_one_and_what_is_drawn_of_each_is_told(visit: Visit):
    chats = [{"messages": [*turns(), turns()[0], {**turns()[1], "loss": False}]}, {"messages": turns()}]
    mixed = f"{visit.write(ROWS)}:2,chats={visit.write(chats, 'chats.json')}:1"
    code, text = visit("--train_file", mixed, "--stopping_strategy", "all_exhausted", "--validation_split", "2")
    assert code == 0 and "Overlap of train_train and train_chats\n" in text
    assert "rows with answers that carry no loss: 1" in text
    drawn = re.search(r"chats: weight 33.3 %, (\d+) drawn \([\d.]+ %\) of 2 examples", text)
    assert int(drawn[1]) >= 2 and "validation_train: 2 rows read" in text


def test_every_bad_row_is_listed_and_the_command_leaves_with_1(visit: Visit, monkeypatch: pytest.MonkeyPatch):
    bad = ['{"content": "a', {"content": "a"}, {"content": "", "summary": "b"}, {"content": 5, "summary": "b"}]
    code, text = visit("--train_file", visit.write([*ROWS, *bad]))
    assert code == 1
    for line, problem in enumerate(("not JSON", "no column 'summary'", "prompt is empty", "the number 5"), 11):
        assert re.search(rf"train\.json, line {line}, .*{problem}", text)
    assert "Training would fail: 4 problems" in text
    monkeypatch.setattr(split_loading, "_FIRST_ROWS", 5)
    code, text = visit("--train_file", visit.write([*ROWS, *bad]), "--streaming", "--max_steps", "9")
    assert code == 1 and "Training would fail: 4 problems" in text and "9 steps of 8 rows: a stream" in text
    assert "all rows are read, 10 can be used, and the first 5 are examined here more closely" in text


def test_bad_rows_that_are_to_be_skipped_are_listed_without_failing(visit: Visit):
    code, text = visit("--train_file", visit.write([*ROWS, {"content": "a"}]), "--skip_bad_rows", "true")
    assert code == 0
    assert "Rows of train that are left out\n" in text and "line 11, there is no column 'summary'" in text


def test_rows_beyond_the_limit_are_counted(visit: Visit, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "MOST_PROBLEMS", 2)
    code, text = visit("--train_file", visit.write([*ROWS, *({"content": "a"} for _ in range(5))]))
    assert "… and 3 more" in text and "5 problems" in text


def test_rows_that_the_lengths_cannot_hold_are_all_listed(visit: Visit):
    rows = [
        {"messages": [{"role": "system", "content": "长" * 60 * (number in (1, 3))}, *turns()]} for number in range(4)
    ]
    code, text = visit("--train_file", visit.write(rows), "--max_source_length", "60")
    assert code == 1
    assert re.findall(r"train\.json, line (\d)", text.split("PROBLEM")[1].split("\n\n")[0]) == ["2", "4"]


def turns() -> list[dict]:
    return [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]


def test_a_column_that_is_not_there_leaves_with_1(visit: Visit):
    words = ("--prompt_column", "contnt", "--response_column", "summary")
    code, text = visit("--train_file", visit.write(ROWS), *words)
    assert code == 1 and "the nearest is 'content'" in text


def test_a_tokenizer_of_another_model_leaves_with_1(visit: Visit, tiny_model_dirs: dict[str, Path]):
    mixed = visit.folder / "mixed"
    shutil.copytree(tiny_model_dirs["chatglm2"], mixed)
    for file in tiny_model_dirs["glm4"].glob("*token*"):
        shutil.copy(file, mixed)
    code, text = visit("--train_file", visit.write(ROWS), base=mixed)
    assert code == 1 and "do not belong together" in text
    assert "Remarks on train" in text


def test_flags_that_are_wrong_leave_with_2(visit: Visit):
    assert visit("--train_file", "x.json", "--max_source_lenght", "4")[0] == 2
    code, text = visit()
    assert code == 2 and "There is nothing to examine" in text


def test_longer_limits_are_suggested_where_rows_are_cut(visit: Visit):
    _, text = visit("--train_file", visit.write(ROWS), "--max_source_length", "24")
    flags = re.search(r"^  (--max_source_length \d+)\n  These hold 99 %; .* cut 100.0 % of the prompts\.", text, re.M)
    again = visit("--train_file", visit.write(ROWS), *flags[1].split())[1]
    assert "nothing to change" in again


def test_lengths_are_told_and_suggested_where_no_row_fits(visit: Visit):
    code, text = visit("--train_file", visit.write(ROWS), "--max_target_length", "1")
    assert code == 1 and "line 10: --max_target_length 1 is too short" in text
    flags = re.search(r"^  (--max_target_length \d+)\n  These hold 99 %", text, re.M)
    assert visit("--train_file", visit.write(ROWS), *flags[1].split())[0] == 0


def test_refused_rows_that_were_not_looked_for_are_told_of(visit: Visit):
    _, text = visit("--train_file", visit.write([*ROWS, *ROWS]), "--max_target_length", "1")
    assert "10 or more problems" in text


def test_one_row_that_is_far_too_long_does_not_decide_the_flags(visit: Visit):
    giant = {"content": "类型#裙", "summary": "很长的句子。" * 2000}
    code, text = visit("--train_file", visit.write([*ROWS, *ROWS, giant]), "--max_target_length", "8")
    assert code == 0
    suggested = re.search(r"^  --max_target_length (\d+)\n  These hold 90 %", text, re.M)
    assert int(suggested[1]) < 100
    assert "answers that are far longer than the others: 1" in text and "line 21 (12,000 characters)" in text


def test_other_rows_than_those_of_the_checkpoint_to_resume_are_a_problem(visit: Visit):
    (visit.folder / "provenance.json").write_text(json.dumps({"data": {"train": {"sha256": "1"}}}))
    code, text = visit("--train_file", visit.write(ROWS), "--resume_from_checkpoint", str(visit.folder))
    assert code == 1 and "goes on with the rows that it was trained on, and these are others" in text


def test_steps_that_teach_by_heart_far_rates_and_rows_beyond_the_base_are_told(visit: Visit):
    flags = "--max_steps 3000 --learning_rate 1e-5 --gradient_accumulation_steps 2 --warmup_steps 3000"
    flags += " --do_eval --eval_strategy steps --eval_steps 5000"
    file, longest = visit.write(ROWS), AutoConfig.from_pretrained(visit.base).max_position_embeddings
    _, text = visit(
        "--train_file", file, "--validation_file", file, *flags.split(), "--num_virtual_tokens", str(longest)
    )
    assert "3,000 steps of 16 rows: 3,000 epochs of 10" in text
    assert "every row is seen 3,000 times" in text and "no evaluation comes before the end" in text
    assert "--warmup_steps 3000 leaves no step" in text
    assert "--learning_rate 1e-05 is far below the usual 0.005 of --peft_type prefix_tuning" in text
    assert f"10 of 10 rows are longer than the {longest:,} tokens that the base was made for" in text
    assert "--keep_file" not in text
    assert "give --keep_file builtin, and --keep_weight 1" in visit("--train_file", file, "--learning_rate", "2e-2")[1]


@pytest.mark.parametrize(
    ("method", "rate", "is_far"),
    [("prefix_tuning", 0.1, False), ("prefix_tuning", 1e-5, True), ("lora", 2e-2, True), ("lora", 1e-3, False)],
)
def test_a_learning_rate_is_far_from_that_of_its_method(method: str, rate: float, is_far: bool):
    assert METHODS[method].is_far(rate) is is_far


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--packing", "true", "--max_length", "8"), "--max_length 8 is less than the longest example"),
        (("--attn_implementation", "flex_attention"), "cannot carry a prefix"),
        (("--adapter_name_or_path", "nowhere"), "--adapter_name_or_path nowhere is no"),
        (("--resume_from_checkpoint", "nowhere"), "--resume_from_checkpoint nowhere is no"),
        (("--do_eval", "true"), "There is no validation data"),
        (("--keep_file", "nowhere.json"), "nowhere.json: there is no such file"),
    ],
)
def test_flags_with_which_training_would_fail_leave_with_1(visit: Visit, words: tuple[str, ...], problem: str):
    code, text = visit("--train_file", visit.write(ROWS), *words)
    assert code == 1 and problem in text


def test_weights_that_are_not_there_leave_with_1(visit: Visit):
    base = Path(shutil.copytree(visit.base, visit.folder / "base"))
    (base / "model.safetensors").unlink()
    code, text = visit("--train_file", visit.write(ROWS), base=base)
    assert code == 1 and "holds no weights" in text and "Rows and lengths of train" in text
    (base / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    code, text = visit("--train_file", visit.write(ROWS), base=base)
    assert code == 1 and "pytorch_model.bin is a git-lfs pointer, not the weights themselves" in text


def test_the_longest_row_of_packed_batches_counts_for_the_memory(visit: Visit):
    file = visit.write(ROWS)
    alone = visit("--train_file", file)[1]
    packed = visit("--train_file", file, "--packing", "true", "--max_length", "300")[1]
    longest = [int(re.search(r"rows of up to (\d+) tokens", text)[1]) for text in (alone, packed)]
    assert 2 * longest[0] < longest[1] <= 300


def test_the_command_takes_a_recipe_of_training_and_writes_nothing(visit: Visit):
    train_file = visit.write(ROWS)
    recipe = visit.folder / "recipe.yaml"
    recipe.write_text(f"do_train: true\ntrain_file: {train_file}\nmodel_name_or_path: {visit.base}\noutput_dir: out\n")
    command = [warm_python(), "-m", "glm_peft.doctor", str(recipe), "--per_device_train_batch_size", "3"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    before = sorted(visit.folder.iterdir())
    run = subprocess.run(command, cwd=visit.folder, env=environment, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    assert "3 in a batch" in run.stdout and "\033" not in run.stdout
    assert sorted(visit.folder.iterdir()) == before


def test_a_histogram_counts_every_length_and_marks_what_is_cut():
    lines = format_histogram("prompt", [3, 4, 4, 25, 31], limit=20).split("\n")
    assert lines[0] == "  prompt, in tokens (limit 20)"
    bars = {row[0]: (int(row[1]), row[2][0]) for row in map(str.split, lines[1:]) if len(row) == 3}
    assert bars == {"0–4": (3, "█"), "25–29": (1, "░"), "30–34": (1, "░")}


def test_the_last_bin_of_a_histogram_is_open_where_a_few_lengths_lie_far_beyond():
    lines = format_histogram("answer", [*range(20, 40), 5000], limit=128).split("\n")
    assert lines[-1].split() == ["110–5000", "1", "██████████"[: len(lines[-1].split()[2])]]
    assert sum(int(line.split()[1]) for line in lines[1:]) == 21


@pytest.mark.parametrize(
    ("is_terminal", "variables", "expected"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)],
)
def test_colour_is_for_terminals_that_want_it(
    is_terminal: bool, variables: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
):
    for name, value in ({"NO_COLOR": "", "TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    assert shows_colour(SimpleNamespace(isatty=lambda: is_terminal)) is expected


def test_a_terminal_without_the_signs_of_a_histogram_gets_the_report(visit: Visit):
    command = [warm_python(), "-m", "glm_peft.doctor", "--train_file", visit.write(ROWS)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    words = ["--model_name_or_path", str(visit.base)]
    run = subprocess.run([*command, *words], env=environment, capture_output=True, encoding="ascii")
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("Training can start.\n")


def test_on_a_terminal_the_tokens_that_carry_loss_are_green():
    text = colour_example("3 tokens\n  no loss 1 'a'\n          2 'b'\n  loss    3 'c'")
    dim, green, plain = "\033[2m", "\033[32m", "\033[0m"
    assert text.split("\n") == [
        "3 tokens",
        f"{dim}  no loss 1 'a'{plain}",
        f"{dim}          2 'b'{plain}",
        f"{green}  loss    3 'c'{plain}",
    ]
