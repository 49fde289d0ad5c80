"""Several sources with weights, and rows that are held out: what is read, mixed, recorded and refused."""

import json
from pathlib import Path

import pytest
from data_fakes import END, CharacterFormat, CharacterTokenizer, make_data_args
from short_runs import NEEDED

from glm_peft.arguments.sources import Source, read_train_sources
from glm_peft.arguments.training import parse_train_arguments
from glm_peft.data import encode_splits
from glm_peft.errors import UserError
from glm_peft.preprocessing.label_weights import has_weights
from glm_peft.preprocessing.split_loading import load_splits
from glm_peft.provenance.recipe import public_sources
from glm_peft.provenance.record import describe_data

ROWS = {
    "a.json": [{"prompt": f"a{number}", "response": "x"} for number in range(30)],
    "b.json": [{"instruction": f"b{number}", "input": "i", "output": "x"} for number in range(10)],
}
MIXED = "a.json:3,b.json:1"


@pytest.fixture(autouse=True)
def in_folder_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, rows in ROWS.items():
        write(name, rows)


def write(name: str, rows: list[dict]) -> None:
    Path(name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def load(**flags: object):
    return load_splits(make_data_args(**flags), ["train", "validation"] if "validation_split" in flags else ["train"])


def questions_of(split) -> list[str]:
    return [conversation.messages[0]["content"] for conversation in split]


def encode(**flags: object):
    return encode_splits(load(**flags), CharacterFormat(), CharacterTokenizer(), make_data_args(**flags), False)


def test_a_weight_makes_a_source_and_other_colons_do_not():
    Path("rows:2").touch()
    for file in ("a.json", r"C:\data\a.json", "a:b.json", "rows:2", "a.json,not_there.json", None):
        assert read_train_sources(file) == []
    told = read_train_sources(r"x=C:\data\a.json:0.7, chat=b.json:.3")
    assert told == [Source("x", r"C:\data\a.json", 0.7), Source("chat", "b.json", 0.3)]


def test_a_list_in_yaml_has_names_and_columns():
    rows = "- {name: one, file: a.json, weight: 3, prompt_column: prompt, response_column: response}\n"
    Path("sub").mkdir()
    write("sub/b.json", ROWS["b.json"])
    Path("run.yaml").write_text(f"train_file:\n{rows}- {{file: sub/b.json, weight: 1}}\n", encoding="utf-8")
    words = [word for word in NEEDED if word not in ("--train_file", "train.json")]
    value = parse_train_arguments(["run.yaml", *words]).data.train_file
    columns = {"prompt_column": "prompt", "response_column": "response"}
    assert read_train_sources(value) == [Source("one", "a.json", 3.0, columns), Source("b", "sub/b.json", 1.0)]
    assert "sub" not in public_sources(value) and len(read_train_sources(public_sources(value))) == 2
    Path("run.yaml").write_text("train_file: [a.json:3, sub/b.json:1]\n", encoding="utf-8")
    assert public_sources(parse_train_arguments(["run.yaml", *words]).data.train_file) == "a=a.json:3,b=b.json:1"
    Path("run.yaml").write_text("train_file: [a.json:3, b.json:0]\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"the weight of b.json must be above 0, found 0; .* \(run.yaml, line 1, train_"
    ):
        parse_train_arguments(["run.yaml", *words])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a.json:1,b.json:-1"], "the weight of b.json must be above 0, found -1"),
        (["a.json:1,b.json"], "b.json has no weight, and others have one"),
        (["a.json,b.json"], "several files want a weight each, such as a.json:1,b.json:1"),
        (["x=a.json:1,x=b.json:1"], "two sources have the name x"),
        (['{"file": "a.json", "wait": 1}'], "a source has a file, a weight and maybe a name"),
        (['{"file": "a.json", "weight": 1},b.json:1'], "is not a list of sources"),
        (["a.json", "--stopping_strategy", "all_exhausted"], "needs several sources"),
        (["a.json", "--do_eval", "--validation_split", "0"], "must be a share between 0 and 1, or a whole number"),
        (["a.json", "--do_eval", "--validation_split", "1.5"], "must be a share between 0 and 1, or a whole number"),
        (["a.json", "--do_eval", "--validation_split", "9", "--validation_file", "b.json"], "leave one of them out"),
    ],
)
def test_what_cannot_be_mixed_or_held_out_is_refused_in_one_sentence(words, told):
    given = [word for word in NEEDED if word not in ("--train_file", "train.json")]
    with pytest.raises(UserError, match=told) as error:
        parse_train_arguments([*given, "--train_file", *words])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"train_file": "a.json:1,c.json:1"}, "c.json: there is no such file; the nearest name beside it is"),
        ({"train_file": "a.json:1,empty.json:1"}, "empty.json holds no rows"),
        (
            {"train_file": MIXED, "prompt_column": "prompt", "response_column": "response"},
            "b.json, line 1: there is no column 'prompt', .*--prompt_column",
        ),
        ({"train_file": "a.json", "validation_split": 30}, "would hold out 30 of 30 rows"),
        ({"train_file": "same.json", "validation_split": 0.5}, "each question has more rows than the 1 to hold out"),
    ],
)
def test_sources_that_cannot_be_read_or_divided_are_told(flags, told):
    write("same.json", [{"prompt": "q", "response": "x"}] * 2)
    Path("empty.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match=told):
        load(**flags)


def test_sources_of_different_forms_are_mixed_by_their_weights_the_same_every_time():
    data = encode(train_file=MIXED)
    report = data.reports["train"]
    assert {name: (share, examples) for name, (share, examples, _) in report.sources.items()} == {
        "a": (0.75, 30),
        "b": (0.25, 10),
    }
    drawn = [chr(ids[0]) for ids in data.examples["train"]["input_ids"]]
    assert [report.sources[name][2] for name in "ab"] == [drawn.count("a"), drawn.count("b")]
    assert {*data.examples["train"].column_names} == {"input_ids", "labels", "length"}
    assert encode(train_file=MIXED).examples["train"][:] == data.examples["train"][:]
    assert encode(train_file=MIXED, rows_seed=1).examples["train"][:] != data.examples["train"][:]
    whole = encode(train_file=MIXED, stopping_strategy="all_exhausted_without_replacement").examples["train"]
    assert len(whole) == 40 and len({tuple(ids) for ids in whole["input_ids"]}) == 40


def test_a_source_may_have_weights_of_messages():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]
    write("c.json", [{"messages": messages}] * 20)
    mixed = encode(train_file="a.json:1,c.json:1").examples["train"]
    assert has_weights(mixed) and {tuple(ids) for ids in mixed["input_ids"]} >= {tuple(map(ord, "a0>x")) + (END,)}


def test_every_source_is_recorded_and_other_weights_are_other_rows():
    def describe(**flags: object) -> dict:
        return describe_data(make_data_args(**flags), load(**flags))["train"]

    described = describe(train_file=MIXED)
    assert [(each["name"], each["file"], each["weight"], each["rows"]) for each in described["sources"]] == [
        ("a", "a.json", 3.0, 30),
        ("b", "b.json", 1.0, 10),
    ]
    assert all(len(each["sha256"]) == 64 for each in described["sources"]) and described["seed"] == 42
    assert described == describe(train_file=MIXED)
    assert described["rows_sha256"] != describe(train_file="a.json:3,b.json:2")["rows_sha256"]
    assert described["rows_sha256"] != describe(train_file=MIXED, rows_seed=1)["rows_sha256"]


def test_rows_that_begin_with_the_same_question_are_held_out_together():
    longer = [{"prompt": f"then {number}", "response": "y", "history": [[f"a{number}", "x"]]} for number in range(30)]
    write("a.json", [*ROWS["a.json"], *longer])
    found = load(train_file="a.json", validation_split=0.2)
    train, held = (questions_of(found[name]) for name in ("train", "validation"))
    assert (len(train), len(held)) == (48, 12) and not {*train} & {*held}
    write("a.json", [*longer[::-1], *ROWS["a.json"]])
    assert {*questions_of(load(train_file="a.json", validation_split=12)["validation"])} == {*held}
    other = load(train_file="a.json", validation_split=0.2, rows_seed=7)["validation"]
    assert {*questions_of(other)} != {*held}


def test_what_is_held_out_of_each_source_is_a_set_of_its_own_recorded_and_limited(caplog):
    flags = {"train_file": MIXED, "validation_split": 0.5, "max_eval_samples": 7}
    found = load(**flags)
    assert {name: len(split) for name, split in found.items()} == {
        "train": 20,
        "validation_a": 7,
        "validation_b": 10 - len(found["train"].parts[1]),
    }
    described = describe_data(make_data_args(**flags), found)
    assert [described[f"validation_{name}"]["file"] for name in "ab"] == ["a.json", "b.json"]
    told = described["validation_a"]
    assert (told["held_out"], told["seed"], told["rows"]) == (0.5, 42, 7) and len(told["sha256"]) == 64
    alone = load_splits(make_data_args(**flags), ["validation"])
    assert [split.conversations for split in alone.values()] == [
        found[name].conversations for name in found if name != "train"
    ]
    assert "validation_b" not in load(train_file=MIXED, validation_split=1, rows_seed=1)
    assert "b.json: 0 of 10 rows are held out" in caplog.text
