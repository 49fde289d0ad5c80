"""State the facts about transformers' own flags that `option` states about ours."""

from typing import Any

_IN_CARD = "lr_scheduler_type warmup_steps per_device_train_batch_size gradient_accumulation_steps "
_IN_CARD += "label_smoothing_factor seed"
_IN_CARD_IF_CHANGED = "optim weight_decay max_grad_norm adam_beta1 adam_beta2 bf16 fp16 full_determinism"
# They say where a run was and which services it reported to, and change nothing of its result.
_NEVER_TOLD = "output_dir logging_dir run_name project push_to_hub resume_from_checkpoint "
_NEVER_TOLD += "disable_tqdm log_level"
NEVER_TOLD_KINDS = ("hub_", "trackio_")
"""The beginnings of further flags' names that no record tells."""

_SHARED = "output_dir seed predict_with_generate load_best_model_at_end metric_for_best_model greater_is_better "
_SHARED += "resume_from_checkpoint use_cpu disable_tqdm run_name"
SHARED_BY_TRIALS = frozenset(_SHARED.split())
SHARED_BY_TRIALS_KINDS = ("do_", "eval_", "save_", "push_", "hub_", "report_", "log_", "logging_")
"""What no search may vary: names, and how further names begin."""

_NO_INFLUENCE = "output_dir disable_tqdm do_train do_eval do_predict resume_from_checkpoint dataloader_num_workers"
WITHOUT_INFLUENCE = frozenset(_NO_INFLUENCE.split())
WITHOUT_INFLUENCE_KINDS = ("save_", "log_", "logging_", "report_", "hub_")
"""What no trial's result depends on, so that a search may go on with other values."""

_OF_BEST = "metric_for_best_model greater_is_better"
# An evaluation computes the loss, and scores of generated answers; a row's length has one name.
_OF_METRICS = "batch_eval_metrics eval_accumulation_steps eval_do_concat_batches eval_use_gather_object "
_OF_METRICS += "include_for_metrics prediction_loss_only length_column_name"

EVALUATION = ("do_eval", "do_predict", "eval_strategy")
"""What needs an evaluation or a prediction; see `needs` of `glm_peft.arguments.fields.option`."""

FACTS: dict[str, dict[str, Any]] = {}
"""The facts by the name of the flag and that of the fact."""

for _fact, _value, _names in (
    ("recipe", "always", _IN_CARD),
    ("recipe", "changed", _IN_CARD_IF_CHANGED),
    ("public", "never", _NEVER_TOLD),
    ("outdoes", ("max_steps",), "num_train_epochs"),
    ("outdoes", ("fp16",), "bf16"),
    ("outdoes", ("bf16",), "fp16"),
    ("ends", ("eval_strategy",), "do_eval"),
    ("ends", ("torch_compile_backend", "torch_compile_mode"), "torch_compile"),
    ("needs", ("!max_steps",), "num_train_epochs"),
    ("needs", ("!streaming",), "data_seed"),
    ("needs", ("lr_scheduler_type!=constant|reduce_lr_on_plateau|greedy",), "warmup_steps"),
    ("needs", ("optim!=adafactor|adagrad|adalomo|lomo|rmsprop|sgd",), "adam_beta1 adam_beta2 adam_epsilon"),
    ("needs", ("optim=galore.*|apollo.*",), "optim_target_modules"),
    ("needs", ("logging_strategy=steps", "eval_strategy=steps"), "logging_steps"),
    ("needs", ("eval_strategy=steps",), "eval_steps"),
    ("needs", ("eval_strategy!=no",), f"eval_delay load_best_model_at_end {_OF_BEST}"),
    ("needs", ("do_eval", "eval_strategy"), "eval_on_start"),
    ("needs", EVALUATION, "per_device_eval_batch_size predict_with_generate"),
    ("needs", ("save_strategy=steps",), "save_steps"),
    ("needs", ("save_strategy!=no",), "save_total_limit save_only_model"),
    ("needs", ("do_train",), "resume_from_checkpoint"),
    ("needs", ("resume_from_checkpoint",), "ignore_data_skip restore_callback_states_from_checkpoint"),
    ("needs", ("push_to_hub",), "hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision"),
    ("needs", ("report_to!=none",), "run_name"),
    ("needs", ("report_to=.*(trackio|all).*",), "project trackio_space_id trackio_bucket_id trackio_static_space_id"),
    ("needs", ("fsdp",), "fsdp_config"),
    ("needs", (), _OF_METRICS),
):
    for _name in _names.split():
        FACTS.setdefault(_name, {})[_fact] = _value

MOST_USED = {
    "tasks": "do_train do_eval do_predict predict_with_generate output_dir resume_from_checkpoint seed",
    "batches and steps": "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "max_steps num_train_epochs train_sampling_strategy",
    "optimizer": "lr_scheduler_type warmup_steps weight_decay max_grad_norm optim bf16 fp16",
    "evaluation and checkpoints": "eval_strategy eval_steps save_strategy save_steps save_total_limit "
    "load_best_model_at_end metric_for_best_model",
}
"""The flags of transformers that are used most, by purpose, which the short help names."""
