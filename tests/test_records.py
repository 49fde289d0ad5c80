"""Reading files into rows: what is accepted, the line numbers, and one sentence for each way a file can be wrong."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from glm_peft.errors import UserError
from glm_peft.preprocessing.records import Row, describe_value, read_hub_rows, read_rows


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def rows_of(file: str) -> list[tuple[int, dict]]:
    return [(row.number, row.values) for row in read_rows(file)]


def problem_of(file: str) -> str:
    """The sentence of the error that reading the whole file raises, without the folder of the test."""
    with pytest.raises(UserError) as error:
        list(read_rows(file))
    message = str(error.value).replace(str(Path(file).parent) + "/", "")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "ROWS.JSON"])
def test_json_lines_are_read_under_either_extension(write, name):
    assert rows_of(write(name, '{"a": "1"}\n\n{"a": "2"}\r\n')) == [(1, {"a": "1"}), (3, {"a": "2"})]


def test_array_elements_know_the_line_on_which_they_begin(write):
    text = '\n[\n  {"a":\n "1"}, {"a": "2"},\n  {"a": "3"}\n]\n'
    assert rows_of(write("rows.json", text)) == [(3, {"a": "1"}), (4, {"a": "2"}), (5, {"a": "3"})]


def test_the_array_may_stand_under_data(write):
    text = '{"version": {"data": [1]},\n "data": [\n{"a": "1"},\n{"a": "2"}], "more": 1}'
    assert rows_of(write("rows.json", text)) == [(3, {"a": "1"}), (4, {"a": "2"})]


def test_a_single_object_over_several_lines_is_one_row(write):
    assert rows_of(write("rows.json", '{\n"a": "1"\n}\n')) == [(1, {"a": "1"})]


def test_a_byte_order_mark_is_no_text(write):
    assert rows_of(write("rows.json", b'\xef\xbb\xbf{"a": "\xe4\xb8\xad"}')) == [(1, {"a": "中"})]
    assert rows_of(write("rows.csv", b"\xef\xbb\xbfa,b\n1,2\n")) == [(2, {"a": "1", "b": "2"})]


def test_unicode_line_separators_do_not_end_a_line(write):
    assert rows_of(write("rows.jsonl", '{"a": "x\u2028y\x85z"}\n{"a": ""}')) == [
        (1, {"a": "x\u2028y\x85z"}),
        (2, {"a": ""}),
    ]


def test_csv_rows_know_the_line_on_which_they_begin(write):
    text = 'a,b\n"two\nlines",1\n\n"quote "" here",2\n'
    assert rows_of(write("rows.csv", text)) == [
        (2, {"a": "two\nlines", "b": "1"}),
        (5, {"a": 'quote " here', "b": "2"}),
    ]


def test_csv_fields_may_be_longer_than_the_library_s_default(write):
    [(_, values)] = rows_of(write("rows.csv", "a\n" + "x" * 200_000 + "\n"))
    assert len(values["a"]) == 200_000


def test_parquet_rows_are_counted_from_one(tmp_path):
    rows = [{"q": "1", "h": [["a", "b"]]}, {"q": "2", "h": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = list(read_rows(str(tmp_path / "rows.parquet")))
    assert [row.values for row in read] == rows
    assert read[1].where.endswith("rows.parquet, row 2")


def test_a_broken_line_is_a_row_with_a_problem_and_reading_goes_on(write):
    first, broken, last = read_rows(write("rows.jsonl", '{"a": "1"}\n{"a": "2" "b": 3}\n{"a": "3"}\n'))
    assert broken.where.endswith("rows.jsonl, line 2")
    assert broken.problem == """column 11: this is not JSON (Expecting ',' delimiter), found '"b": 3}'"""
    assert (first.problem, last.problem) == (None, None)


def test_objects_over_several_lines_follow_one_another(write):
    text = '{\n "a": "1"\n}\n\n{\n "a": "2"\n}\n{"a": "3"}\n'
    assert rows_of(write("rows.json", text)) == [(1, {"a": "1"}), (5, {"a": "2"}), (8, {"a": "3"})]


@pytest.mark.parametrize("text", ['{"b": 0}\n{"a": "x\ny"}\n{"b": 1}', '[{"b": 0},\n{"a": "x\ny"},\n{"b": 1}]'])
def test_a_line_break_inside_of_a_text_is_read(write, text):
    assert rows_of(write("rows.json", text)) == [(1, {"b": 0}), (2, {"a": "x\ny"}), (4, {"b": 1})]


def test_a_key_that_repeats_in_an_object_is_told(write):
    told = "the key 'a' stands more than once in one object, which keeps only the last; name each once"
    rows = read_rows(write("rows.json", '{"a": 1}\n{"c": {"a": 1, "a": 2}}\n{\n"a": 1,\n"a": 1}\n{}'))
    assert [row.number for row in rows if row.problem == told] == [2, 3]
    assert f"rows.json, line 2, {told}" in problem_of(write("rows.json", '[{"a": 1},\n{"a": 1, "a": 2}]'))


@pytest.mark.parametrize(
    ("name", "text"),
    [("rows.csv", 'a;b\n"x;y";1,5\n'), ("rows.tsv", "a\tb\nx;y\t1,5\n"), ("rows.csv", "a|b\nx;y|1,5\n")],
)
def test_columns_may_be_separated_by_other_signs(write, name, text):
    assert rows_of(write(name, text)) == [(2, {"a": "x;y", "b": "1,5"})]


@pytest.mark.parametrize("text", ['{"a": "1"\n{"a": "2"}\n', '{"a": "1"\n'])
def test_a_broken_first_line_is_named_as_the_first(write, text):
    row = next(read_rows(write("rows.json", text)))
    assert (row.number, row.problem.split(", found ")[1]) == (1, "the end of the line")


@pytest.mark.parametrize(
    ("text", "number", "words"),
    [
        ('{\n"a": 1\n}\n{\n"a": 1,\n}', 4, "in the object that begins here, line 6, column 1: this is not JSON"),
        ("{'a': 'b'}", 1, "JSON has double quotes, as json.dumps writes them"),
        ('{"a": 1},\n{"a": 2},', 1, "found ','; rows on lines of their own have no comma between them"),
    ],
)
def test_a_broken_line_is_told_with_the_way_out(write, text, number, words):
    row = next(row for row in read_rows(write("rows.jsonl", text)) if row.problem)
    assert (row.number, words in row.problem) == (number, True)


def test_a_folder_is_told_from_a_file(write, tmp_path):
    write("train.json", "{}")
    assert f"is a folder; give one file of rows, such as {tmp_path}/train.json." in str(
        pytest.raises(UserError, read_rows, str(tmp_path)).value
    )


def test_a_line_that_is_no_object_is_a_row_with_a_problem(write):
    [row] = read_rows(write("rows.jsonl", '"text"\n'))
    assert row.problem == 'column 1: a row must be an object, found the text "text"'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.json", "", "rows.json is empty (0 bytes)"),
        ("rows.csv", " \n\n", "rows.csv is empty (3 bytes)"),
        ("rows.txt", "x", "rows.txt: files of this kind cannot be read; give a file ending in .json, .jsonl, .csv"),
        ("rows", "x", "rows: files of this kind cannot be read"),
        ("rows.json", '[{"a": "1"},\n {"a": 2 3}]', "rows.json, line 2, column 10: this is not JSON (Expecting ','"),
        (
            "rows.json",
            '[{"a": "1"}\n {"a": 2}]',
            "rows.json, line 2, column 2: this is not JSON (Expecting ',' or ']')",
        ),
        ("rows.json", '[{"a": "1"},\n]', "rows.json, line 2, column 1: this is not JSON (a comma before"),
        ("rows.json", '[{"a": "1"},', "rows.json, line 1, column 13: this is not JSON (Expecting value)"),
        ("rows.json", '[{"a": "1"}]\n[{"a": "2"}]', "rows.json, line 2, column 1: this is not JSON (text after"),
        ("rows.json", '{\n "data": [\n{"a" 1}]}', "rows.json, line 3, column 6: this is not JSON (Expecting ':'"),
        ("rows.csv", 'a,b\n1,2\n"open,3\n4,5\n', "rows.csv, line 3: the row that begins here is not CSV"),
        ("rows.xlsx", b"PK\x03\x04", "rows.xlsx is an Excel workbook or another zip archive; save the sheet"),
        ("rows.csv", b"PK\x03\x04", "rows.csv is an Excel workbook or another zip archive; save the sheet"),
        ("rows.json.gz", b"\x1f\x8b\x08", "rows.json.gz is packed by gzip; unpack it with gunzip."),
        ("rows.json", "\n<!doctype html>", "rows.json is a web page; download the file itself."),
        ("rows.csv", "a,b,a\n1,2,3\n", "rows.csv, line 1: the header names 'a' more than once."),
        ("rows.parquet", "no parquet", "rows.parquet: this is not a readable Parquet file"),
        ("rows.json", b'{"a": "1"}\n{"a": "\xe9"}\n', "rows.json, line 2, byte 8: 0xe9 is not UTF-8; save"),
        ("rows.csv", "a,b\nn\xe9es,1\n".encode("latin-1"), "rows.csv, line 2, byte 2: 0xe9 is not UTF-8; save"),
        ("rows.csv", "a,b\n1,2\n".encode("utf-16"), "line 1, byte 1: 0xff is not UTF-8 (the file looks like UTF-16)"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_is_named_in_one_sentence(write, name, content, words):
    assert words in problem_of(write(name, content))


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "gb2312"])
@pytest.mark.parametrize("rows", [1, 5000])
def test_a_file_in_gbk_is_guessed_with_the_command_that_converts_it(write, encoding, rows):
    row = {"content": "类型#裤*颜色#白色", "summary": "这条裤子是白色的，很好看。"}
    text = '{"content": "a"}\n' + "\n".join([json.dumps(row, ensure_ascii=False)] * rows)
    file = write("rows.json", text.encode(encoding))
    problem = problem_of(file)
    assert "rows.json, line 2, byte 14: 0xc0 is not UTF-8 (the file looks like GBK)" in problem
    assert "`iconv -f GB18030 -t UTF-8 rows.json > NEW_FILE`" in problem


def test_csv_rows_of_another_width_have_a_problem(write):
    short, long = read_rows(write("rows.csv", "a,b\n1\n1,2,3\n"))
    assert short.problem == "the row has 1 fields, but the header names 2 columns"
    assert (long.number, long.problem) == (3, "the row has 3 fields, but the header names 2 columns")


def test_a_missing_file_names_the_nearest(write, tmp_path):
    write("train.json", "{}")
    assert "there is no such file; the nearest name beside it is 'train.json'" in problem_of(
        str(tmp_path / "trian.json")
    )
    assert "and no folder" in problem_of(str(tmp_path / "none" / "train.json"))


@pytest.fixture
def dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"prompt": "q", "response": "a"}) + "\n")
    return str(folder)


def test_a_data_set_that_the_library_loads_gives_rows(dataset_folder):
    [row] = read_hub_rows(dataset_folder, None, "train")
    assert row == Row(dataset_folder, "train row", 1, {"prompt": "q", "response": "a"})


def test_a_split_that_a_data_set_lacks_is_an_error_with_those_it_has(dataset_folder):
    with pytest.raises(UserError, match="has no split 'validation', only 'train'; give a file instead"):
        read_hub_rows(dataset_folder, None, "validation")


def test_a_data_set_that_cannot_be_loaded_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="--dataset_name .*missing could not be loaded: .+") as error:
        read_hub_rows(str(tmp_path / "missing"), None, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "null"),
        (True, "the truth value true"),
        (1.5, "the number 1.5"),
        ("中" * 50, 'the text "' + "中" * 39 + "…"),
        ([1, "a"], 'the list [1, "a"]'),
        ({"a": 1}, 'the object {"a": 1}'),
    ],
)
def test_values_are_described_in_the_words_of_json(value, words):
    assert describe_value(value) == words
