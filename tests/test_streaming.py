"""Rows that are streamed: read in parts, mixed, shuffled, encoded, packed and shared, always in the same order."""

import io
import json
from itertools import islice
from pathlib import Path

import pytest
from accelerate.data_loader import IterableDatasetShard
from data_fakes import CharacterFormat, CharacterTokenizer, make_data_args
from short_runs import NEEDED
from torch.utils.data import DataLoader
from transformers import GlmConfig

from glm_peft.arguments.training import parse_train_arguments
from glm_peft.data import encode_splits, stream_examples
from glm_peft.errors import UserError
from glm_peft.preprocessing import json_values, packing, split_loading
from glm_peft.preprocessing.split_loading import load_splits
from glm_peft.preprocessing.streaming import StreamedExamples
from glm_peft.provenance.record import describe_data

TEXTS = {
    "lines": '\n{"a": 1}\n\n{"a": "两行\n}"}\n{"a": 1, "a": 2}\n{"b": [{}]}\nno row\n{\n "a": 3\n}',
    "array": ' [{"a": 1}, {"a": [2,\n 3]},\n\n{"b": "]"}]\n',
    "comma": '[{"a": 1},\n{"a": 2},]',
    "more": '[{"a": 1}]\n[]',
    "torn": '[{"a": 1},\n {"a": 2}\n {"a": 3}, {"a": 4}, {"a": 5}, {"a": 6}]',
    "short": '{"a": 1}\n{"a": 2',
    "data": '{"data": [{"a": 1}]}',
    "blank": " \n",
}


@pytest.fixture(autouse=True)
def in_folder_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(split_loading, "_FIRST_ROWS", 3)
    monkeypatch.setattr(packing, "_PACKED_TOGETHER", 23)
    write("a.jsonl", [{"prompt": f"a{number:02}", "response": "x" * (number % 5) + "."} for number in range(23)])
    write("b.jsonl", [{"question": f"b{number:02}", "answer": "y"} for number in range(9)])


def write(name: str, rows: list[dict]) -> None:
    Path(name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def stream(train_file: str = "a.jsonl", block: int = 4, **flags: object) -> StreamedExamples:
    flags = {"shuffle_buffer_size": 8} | flags
    data_args = make_data_args(train_file=train_file, streaming=True, **flags)
    split = load_splits(data_args, ["train"])["train"]
    config = GlmConfig(hidden_size=8)
    return stream_examples(split, CharacterFormat(), CharacterTokenizer(), config, data_args, block)


def questions(examples) -> list[str]:
    """The first three characters of each example."""
    return ["".join(map(chr, example["input_ids"][:3])) for example in examples]


def read_json(text: str, size: int) -> list:
    try:
        return list(json_values.json_values("f", io.StringIO(text), size))
    except UserError as error:
        return [str(error)]


@pytest.mark.parametrize("name", TEXTS)
def test_json_is_the_same_in_parts_of_any_size(name):
    whole = read_json(TEXTS[name], -1)
    # No smaller than the longest value, with what a message shows of the text behind it.
    for size in range(45, len(TEXTS[name]) + 2):
        assert read_json(TEXTS[name], size)[-len(whole) :] == whole
    assert whole or name == "blank"


def test_a_value_that_is_longer_than_what_is_held_is_told_with_its_line():
    long = json.dumps({"a": "x" * 50})
    told = "line 2, the value that begins here has more than 20 characters, the most that --streaming holds of one"
    assert read_json(f'[{{"a": 1}},\n{long}]', 20) == [
        f"f, {told}; rows under 'data' become JSON lines by `jq -c '.data[]'`."
    ]
    assert [problem and problem[:9] for _, _, problem in read_json(f'{{"a": 1}}\n{long}', 20)][:2] == [
        None,
        "the value",
    ]


def test_each_pass_has_every_row_once_in_an_order_of_its_own():
    rows = questions(islice(stream(), 69))
    passes = [rows[:23], rows[23:46], rows[46:]]
    assert all(sorted(each) == [f"a{number:02}" for number in range(23)] for each in passes)
    assert passes[0] != passes[1] != passes[2] and sorted(rows[:4]) != rows[:4]
    assert questions(islice(stream(), 69)) == rows != questions(islice(stream(rows_seed=1), 69))
    assert questions(islice(stream(shuffle_buffer_size=1, max_train_samples=5), 7)) == [
        *(f"a0{n}" for n in range(5)),
        "a00",
        "a01",
    ]
    encoded = encode_splits(
        load_splits(make_data_args(train_file="a.jsonl"), ["train"]),
        CharacterFormat(),
        CharacterTokenizer(),
        make_data_args(),
        False,
    )
    wanted = [(row["input_ids"], row["labels"]) for row in encoded.examples["train"]]
    assert sorted((row["input_ids"], row["labels"]) for row in islice(stream(), 23)) == sorted(wanted)


def test_sources_are_mixed_by_weights_and_with_all_their_rows():
    rows = questions(islice(stream("a.jsonl:3,b.jsonl:1", stopping_strategy="all_exhausted_without_replacement"), 64))
    assert sorted(rows[:32]) == sorted(rows[32:]) == [*(f"a{n:02}" for n in range(23)), *(f"b0{n}" for n in range(9))]
    assert rows[:32] != rows[32:]
    first = questions(islice(stream("a.jsonl:1,b.jsonl:1"), 200))
    assert 60 < sum(row.startswith("a") for row in first) < 140


@pytest.mark.parametrize("flags", [{}, {"packing": True, "max_length": 12}])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_workers_share_batches_so_that_a_step_has_the_rows_that_it_has_in_one(flags, workers):
    whole = list(islice(stream(**flags), 48))
    loaders = [
        DataLoader(
            IterableDatasetShard(stream(**flags), batch_size=2, num_processes=2, process_index=index),
            batch_size=2,
            num_workers=workers,
            collate_fn=list,
        )
        for index in range(2)
    ]
    steps = islice(zip(*loaders, strict=True), 12)
    assert [row for step in steps for batch in step for row in batch] == whole


@pytest.mark.parametrize("flags", [{}, {"packing": True, "max_length": 12}])
def test_what_a_resumed_run_has_had_is_not_encoded_again(flags):
    examples = stream(**flags)
    whole, examples.skipped = list(islice(examples, 40)), 30
    assert list(islice(examples, 40)) == [{"input_ids": [], "labels": []}] * 30 + whole[30:]


def test_packed_rows_hold_every_example_once_with_positions_of_its_own():
    rows = []
    for row in stream(packing=True, max_length=12):
        rows.append(row)
        if sum(row["position_ids"].count(0) for row in rows) == 23:
            break
    assert all(len(row["input_ids"]) <= 12 and row["position_ids"].count(0) >= 1 for row in rows)
    starts = [
        "".join(map(chr, row["input_ids"][place : place + 3]))
        for row in rows
        for place, position in enumerate(row["position_ids"])
        if position == 0
    ]
    assert len(starts) > len(rows) and {*starts} == {f"a{number:02}" for number in range(23)}


def test_rows_that_cannot_be_used_are_told_with_file_and_line_when_they_are_read(caplog):
    caplog.set_level("INFO")
    rows = [{"prompt": f"q{number}", "response": "x", "id": 1} for number in range(30)]
    write("bad.jsonl", [*rows[:8], {"prompt": "q", "response": 3}, {"prompt": "q", "response": ""}, *rows])
    with pytest.raises(
        UserError, match=r"bad.jsonl, line 9, column 'response': the answer must be text, found the nu"
    ):
        list(islice(stream("bad.jsonl"), 30))
    rows[20] |= {"context": "c", "response": "x" * 200}
    write("bad.jsonl", [*rows[:8], *[{"prompt": "q", "response": ""}] * 12, *rows[8:]])
    assert len(questions(islice(stream("bad.jsonl", skip_bad_rows=True), 31))) == 31
    told = [record.message for record in caplog.records]
    empty = "column 'response': the answer is empty, found '': left out"
    assert [each for each in told if "left out" in each][:3] == [
        f"bad.jsonl, line 9, {empty} (1 so far).",
        f"bad.jsonl, line 18, {empty} (10 so far).",
        "bad.jsonl: read to its end, 30 rows used, 12 left out.",
    ]
    assert "bad.jsonl, line 33: not read: 'context' (1 row; no flag reads it)." in told
    assert "bad.jsonl, line 33: its answer is cut to --max_target_length 128 (1 so far)." in told
    Path("cut.json").write_text(f"[{','.join(map(json.dumps, rows))}"[:-9], encoding="utf-8")
    with pytest.raises(UserError, match="cut.json, line 1, column .*: this is not JSON"):
        list(islice(stream("cut.json"), 30))
    Path("latin.csv").write_bytes(b"prompt,response\n" + b"a,b\n" * 3000 + b"\xe4,b\n")
    with pytest.raises(UserError, match="latin.csv, line 3002, byte 1: 0xe4 is not UTF-8"):
        list(islice(stream("latin.csv"), 3001))
    with pytest.raises(
        UserError, match="bad.jsonl, line 9: the example has 12 tokens, and a packed row --max_length 8"
    ):
        write("bad.jsonl", [*rows[:8], {"prompt": "q", "response": "long text"}])
        list(islice(stream("bad.jsonl", packing=True, max_length=8), 30))


def test_a_dataset_of_the_hub_is_streamed_whole_by_every_worker(tmp_path):
    (tmp_path / "set").mkdir()
    for name in "ab":
        write(f"set/{name}.jsonl", [{"prompt": f"{name}{number:02}", "response": "x"} for number in range(6)])
    examples = stream(None, dataset_name=str(tmp_path / "set"))
    rows = [row for batch in islice(DataLoader(examples, 4, num_workers=2, collate_fn=list), 3) for row in batch]
    assert sorted(questions(rows)) == [f"{name}{number:02}" for name in "ab" for number in range(6)]


def test_a_stream_is_known_again_by_its_files_its_buffer_and_its_seed():
    def describe(**flags: object) -> dict:
        flags = {"shuffle_buffer_size": 8, "train_file": "a.jsonl:3,b.jsonl:1"} | flags
        data_args = make_data_args(streaming=True, **flags)
        return describe_data(data_args, load_splits(data_args, ["train"]))["train"]

    described = describe()
    assert described["shuffle_buffer_size"] == 8 and described["seed"] == 42 and "rows" not in described
    assert all("rows" not in source for source in described["sources"])
    others = [{"shuffle_buffer_size": 9}, {"rows_seed": 1}, {"max_train_samples": 5}]
    digests = [describe(**flags)["rows_sha256"] for flags in ({}, {}, *others, {"train_file": "a.jsonl"})]
    write("a.jsonl", [*map(json.loads, Path("a.jsonl").read_text().splitlines()), {"prompt": "z", "response": "z"}])
    assert digests[0] == digests[1] and len({*digests, describe()["rows_sha256"]}) == 6


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "--streaming does not know how many rows there are: say with --max_steps"),
        ("--max_steps 9 --save_strategy epoch", "--save_strategy epoch waits for the end of the rows"),
        ("--max_steps 9 --do_eval --validation_split 0.1", "--validation_split 0.1 is drawn from all rows"),
        ("--max_steps 9 --train_sampling_strategy group_by_length", "needs all rows at once"),
        ("--max_steps 9 --shuffle_buffer_size 0", "--shuffle_buffer_size must be at least 1"),
        ('--max_steps 9 --accelerator_config {"dispatch_batches":true}', "cannot share the batches of --streaming"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_in_one_sentence(words, told):
    with pytest.raises(UserError, match=told) as error:
        parse_train_arguments([*NEEDED, "--streaming", *words.split()])
    assert "\n" not in str(error.value)
