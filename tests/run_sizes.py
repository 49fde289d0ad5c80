"""Evaluation and prediction of data sets of several sizes in one group of processes; no test itself."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from glm_peft import predict, train

TASKS = "--do_eval --predict_with_generate --do_predict --per_device_eval_batch_size 6 --use_cpu true"
DRAWN = "--do_sample --top_p 0.9"


def main() -> None:
    """`run_sizes.py BASE ADAPTER FOLDER SIZE…`, with files rows_SIZE.json; notes of how many processes each is one."""
    base, adapter, folder, *sizes = sys.argv[1:]
    common = ["--model_name_or_path", base, "--adapter_name_or_path", adapter, "--max_new_tokens", "6"]
    for size in sizes:
        rows, out = f"{folder}/rows_{size}.json", f"{folder}/{size}"
        words = [*common, "--test_file", rows, "--output_dir"]
        _type(train, [*words, f"{out}/train", *TASKS.split(), "--validation_file", rows])
        _type(predict, [*words, f"{out}/predict"])
        _type(predict, [*words, f"{out}/drawn", *DRAWN.split()])
    state = PartialState()
    is_group = state.num_processes > 1 and torch.distributed.is_initialized()
    facts = {"processes": state.num_processes, "group": torch.distributed.get_world_size() if is_group else 1}
    (Path(folder) / f"process_{state.process_index}.json").write_text(json.dumps(facts))
    state.destroy_process_group()


def _type(command: object, words: list[str]) -> None:
    sys.argv = [command.__name__, *words]
    command.main()


if __name__ == "__main__":
    main()
