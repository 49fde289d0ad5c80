"""The trainer's own prediction of a few rows, for any number of processes; no test itself."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from short_runs import training_words

from glm_peft import train

ROWS = 5


def main() -> None:
    """`run_predict_logits.py BASE FOLDER`: writes what the main process got of the first five rows."""
    base, folder = sys.argv[1], Path(sys.argv[2])
    found = {}

    class Predicting(train.PrefixTrainer):
        def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
            output = self.predict(self.eval_dataset.select(range(ROWS)))
            found.update(predictions=output.predictions, labels=output.label_ids, loss=output.metrics["test_loss"])
            return {}

    train.PrefixTrainer = Predicting
    flags = ["--do_train", "false", "--do_eval", "--per_device_eval_batch_size", "2"]
    sys.argv = ["train.py", *training_words(Path(base), folder / "out", *flags)]
    train.main()
    state = PartialState()
    if state.is_main_process:
        tensors = {name: torch.as_tensor(value) for name, value in found.items()}
        torch.save(tensors | {"processes": torch.tensor(state.num_processes)}, folder / "found.pt")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
