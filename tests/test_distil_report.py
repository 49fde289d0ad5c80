"""What the end of `make demo-distil` shows."""

import json
from pathlib import Path

from distil_report import WAYS, answers_side_by_side, score_table

from glm_peft.reporting.file_names import COMPARISON_NAME, PREDICT_RESULTS_NAME, PREDICTIONS_NAME


def test_the_report_has_the_answers_and_the_scores_of_all_three_ways(tmp_path: Path):
    answers = {"document": ("杭州", 100.0, 474), "prefix": ("成都", 98.2, 128), "neither": ("不知道", 0.0, 0)}
    for way, (answer, score, _) in answers.items():
        (tmp_path / way).mkdir()
        row = {"prompt": "黄明的家乡？", "labels": "杭州", "predict": answer}
        (tmp_path / way / PREDICTIONS_NAME).write_text(json.dumps(row) + "\n")
        (tmp_path / way / PREDICT_RESULTS_NAME).write_text(json.dumps({"predict_exact_match": score}))
    (tmp_path / "adapter").mkdir()
    ways = {way: {"context_tokens": tokens} for way, (_, _, tokens) in answers.items()}
    (tmp_path / "adapter" / COMPARISON_NAME).write_text(json.dumps({"ways": ways}))
    assert answers_side_by_side(tmp_path).splitlines()[1].split() == ["黄明的家乡？", "杭州", "成都", "不知道", "杭州"]
    lines = [line.split() for line in score_table(tmp_path).splitlines()[1:]]
    assert [line[-3:] for line in lines] == [["474", "100.0", "%"], ["128", "98.2", "%"], ["0", "0.0", "%"]]
    assert [" ".join(line[:-3]) for line in lines] == list(WAYS.values())
