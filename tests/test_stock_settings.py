"""Settings of transformers' trainer that cannot work are refused before anything is loaded."""

import pytest
from short_runs import NEEDED

from glm_peft.arguments.training import TrainingArguments, parse_train_arguments
from glm_peft.errors import UserError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optim lomo", "--optim lomo cannot be used .*lomo_optim"),
        ("--optim adamw_anyprecision", "--optim adamw_anyprecision cannot be used .*torchdistx"),
        ("--lr_scheduler_type cosine_with_min_lr", "One of min_lr or min_lr_rate .*--lr_scheduler_kwargs"),
        ("--lr_scheduler_type warmup_stable_decay", "'num_decay_steps'"),
        ('--lr_scheduler_kwargs {"min_lr":1}', "--lr_scheduler_type linear cannot be built .*'min_lr'"),
        ("--fp16", "--fp16 has no effect on a CPU"),
        ("--use_liger_kernel", "--use_liger_kernel would take the place of the loss in chunks"),
        ("--dataloader_persistent_workers", "give --dataloader_num_workers too"),
        ("--save_strategy best", "--save_strategy best needs to know by what"),
        ("--include_num_input_tokens_seen maybe", "must be all, non_padding or no, found maybe"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(words, message):
    with pytest.raises(UserError, match=message) as error:
        parse_train_arguments([*NEEDED, *words.split()])
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize(
    "words",
    [
        "--optim adamw_bnb_8bit",
        '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-4}',
        '--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":5} --warmup_steps 0.1',
        "--dataloader_persistent_workers --dataloader_num_workers 1",
        "--save_strategy best --metric_for_best_model loss --do_eval --validation_file v.json --eval_strategy steps",
    ],
)
def test_what_can_work_is_taken(words):
    parse_train_arguments([*NEEDED, *words.split()])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "no"),
        ([""], "all"),
        (["all"], "all"),
        (["non_padding"], "non_padding"),
        (["true"], "all"),
        (["false"], "no"),
    ],
)
def test_the_tokens_to_count_are_named_or_yes_or_no(given, expected):
    words = ["--include_num_input_tokens_seen", *filter(None, given)] if given else []
    assert parse_train_arguments([*NEEDED, *words]).training.include_num_input_tokens_seen == expected
    assert TrainingArguments("out", include_num_input_tokens_seen=True).include_num_input_tokens_seen == "all"


def test_a_checkpoint_on_sigterm_is_not_made_twice(caplog):
    assert not parse_train_arguments([*NEEDED, "--enable_jit_checkpoint"]).training.enable_jit_checkpoint
    assert "--enable_jit_checkpoint is left out" in caplog.text
