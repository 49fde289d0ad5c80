"""
What `--help` says of each command, before anything is imported that takes seconds.

`python -m glm_peft.predict --help` imports this package first, and with it torch and the models. So the package asks
here, first of all, whether the process is one of its own commands with `--help`; a program that imports it never is.
"""

import sys
from pathlib import Path

from glm_peft.errors import exit_with_user_errors
from glm_peft.former_options import IGNORED

COMMANDS = ("convert", "doctor", "inspect_adapter", "predict", "push", "search", "train")
PREDICTION_WORDS = {
    "usage": "python -m glm_peft.predict [CONFIG.yaml|CONFIG.json] [--flags]",
    "description": "Answers to a file or to one prompt, by a base alone or with an adapter. Flags win over the file.",
}
TRAINING_WORDS = {
    "usage": "accelerate launch glm_peft/train.py [CONFIG.yaml|CONFIG.json] [--flags]",
    "description": "P-Tuning v2 for ChatGLM models. Flags win over the file, whose keys are the flags without --.",
    "epilog": f"Accepted from published scripts, without effect: {', '.join(IGNORED)}.",
}
DOCTOR_WORDS = {
    "usage": "python -m glm_peft.doctor [CONFIG.yaml|CONFIG.json] [--flags]",
    "description": "Examines data, tokenizer and memory before training, without loading weights; takes every flag "
    "and file of training. Exit code 0: training can start, 1: it would fail, 2: the flags are wrong.",
}
INSPECTION_WORDS = {
    "usage": "python -m glm_peft.inspect_adapter ADAPTER [OTHER] [--flags]",
    "description": "What is in a prefix adapter or a published P-Tuning v2 checkpoint: sizes and norms, how far OTHER "
    "is from it, and, with --base and --test_file, the attention on it and the loss without each virtual token.",
}
SEARCH_WORDS = {
    "usage": "python -m glm_peft.search [CONFIG.yaml|CONFIG.json] --space SPACE.yaml [--flags]",
    "description": "Trains with many values of the arguments in SPACE.yaml and writes the best as a configuration of "
    "training; takes every flag and file of training. The same command again goes on where it was stopped.",
}
PUSH_WORDS = {
    "usage": "python -m glm_peft.push ADAPTER --repo_id USER/NAME [--flags]\n"
    "       python -m glm_peft.push --queued [FOLDER]",
    "description": "Sends an adapter to the Hub with its card, curves and results, and nothing else; what could not "
    "be sent waits in its folder, and --queued sends it.",
}
TRANSFORMERS_FLAGS = {
    "tasks": "do_train do_eval do_predict predict_with_generate output_dir resume_from_checkpoint seed",
    "batches and steps": "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "max_steps num_train_epochs train_sampling_strategy",
    "optimizer": "lr_scheduler_type warmup_steps weight_decay max_grad_norm optim bf16 fp16",
    "evaluation and checkpoints": "eval_strategy eval_steps save_strategy save_steps save_total_limit "
    "load_best_model_at_end metric_for_best_model",
}
"""The flags of transformers' own that are used most, by what they are for."""


def show_help_if_asked() -> None:
    """Print the help and leave with 0, where this process is a command of this package with `-h` or `--help`."""
    command = _command(sys.orig_argv)
    if command and {"-h", "--help"} & set(sys.argv[1:]):
        with exit_with_user_errors():
            _show_help(command)
        sys.exit(0)


def _command(words: list[str]) -> str | None:
    """Which command of this package an interpreter's words start, as a module or as a script."""
    if "-m" in words:
        package, _, name = "".join(words[words.index("-m") + 1 :][:1]).partition(".")
        return name if package == __package__ and name in COMMANDS else None
    scripts = {Path(__file__).with_name(f"{name}.py"): name for name in COMMANDS}
    return next((scripts[path] for path in (Path(word).absolute() for word in words[1:]) if path in scripts), None)


def _show_help(command: str) -> None:
    if command == "convert":
        from glm_peft.convert_arguments import parse_convert_arguments

        parse_convert_arguments(["--help"])
    if command == "inspect_adapter":
        from glm_peft.inspection.arguments import parse_inspect_arguments

        parse_inspect_arguments(["--help"])
    if command == "push":
        from glm_peft.hub.arguments import parse_push_arguments

        parse_push_arguments(["--help"])
    from glm_peft.command_line import parse_command
    from glm_peft.predict_arguments import PREDICTION_TYPES
    from glm_peft.shared_arguments import DataArguments, ModelArguments
    from glm_peft.training_defaults import TrainingDefaults
    from glm_peft.trials.arguments import SearchArguments

    words = {"predict": PREDICTION_WORDS, "train": TRAINING_WORDS, "doctor": DOCTOR_WORDS, "search": SEARCH_WORDS}
    words = words[command]
    if command != "predict":
        words = words | {"epilog": "\n".join([_transformers_flags(), words.get("epilog", "")])}
    types = PREDICTION_TYPES if command == "predict" else (ModelArguments, DataArguments, TrainingDefaults)
    types = (SearchArguments, *types) if command == "search" else types
    parse_command(["--help"], types, **words)


def _transformers_flags() -> str:
    groups = [f"- {name}: --{flags.replace(' ', ' --')}" for name, flags in TRANSFORMERS_FLAGS.items()]
    return "\n".join(["Of transformers' own flags these are used most; --help_all explains every flag.", *groups])
