"""What glm_peft relies on in transformers, accelerate and PEFT without their promise: here a new release shows it."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard
from accelerate.state import GradientState
from peft import PeftModel
from peft.utils.other import _prepare_prompt_learning_config
from transformers import PreTrainedConfig, PreTrainedTokenizer, PreTrainedTokenizerFast, Seq2SeqTrainer, Trainer
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from glm_peft.training.trainer import PrefixTrainer

TRAINING = Path(__file__).parents[1] / "glm_peft" / "training"
OVERRIDDEN = {
    "_get_train_sampler": ("train_dataset",),
    "_init_training_state": ("max_steps", "num_update_steps_per_epoch", "num_train_epochs"),
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_save_checkpoint": ("model", "trial"),
}
"""Private methods of the Trainer, with the parameters that they are called with by position."""
CALLED = {
    "_get_learning_rate": (),
    "_get_num_items_in_batch": ("batch_samples", "device"),
    "_load_rng_state": ("checkpoint",),
    "_maybe_log_save_evaluate": (
        *("tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time"),
    ),
    "_save": ("output_dir", "state_dict"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_save_rng_state": ("output_dir",),
    "_save_scaler": ("output_dir",),
}
ATTRIBUTES = {"_tr_loss", "_total_loss_scalar", "_globalstep_last_logged"}
"""Of the Trainer, set when training begins."""
PUBLIC = {
    "evaluate": ("eval_dataset", "ignore_keys", "metric_key_prefix"),
    "evaluation_loop": (),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "get_train_dataloader": (),
    "log": ("logs",),
    "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys"),
    "save_model": ("output_dir", "_internal_call"),
    "store_flos": (),
    "train": ("resume_from_checkpoint",),
    "training_step": ("model", "inputs"),
}
"""Its documented methods that are overridden or called."""
OTHERS = [
    (PeftModel.get_prompt, ("batch_size",)),
    (PeftModel.get_prompt_embedding_to_save, ("adapter_name",)),
    (_prepare_prompt_learning_config, ("peft_config", "model_config")),
    (activate_neftune, ("model", "neftune_noise_alpha")),
    (deactivate_neftune, ("model", "hook_handle")),
]


def parameters(function: Any) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(function).parameters if name != "self")


@pytest.mark.parametrize(("name", "expected"), (OVERRIDDEN | CALLED | PUBLIC).items())
def test_the_trainer_has_the_method_with_these_parameters(name, expected):
    assert hasattr(Trainer, name), f"transformers has no Trainer.{name} any more"
    assert parameters(getattr(Trainer, name))[: len(expected)] == expected


@pytest.mark.parametrize("name", sorted(ATTRIBUTES))
def test_the_trainer_keeps_its_losses_under_these_names(name):
    assert re.search(rf"\bself\.{name} = ", inspect.getsource(Trainer)), f"transformers sets no {name} any more"


@pytest.mark.parametrize(("function", "expected"), OTHERS, ids=lambda value: getattr(value, "__name__", ""))
def test_other_functions_have_these_parameters(function, expected):
    assert parameters(function)[: len(expected)] == expected


def test_other_names_are_there():
    assert hasattr(PreTrainedConfig, "_attn_implementation")
    assert all(hasattr(kind, "_encode_plus") for kind in (PreTrainedTokenizer, PreTrainedTokenizerFast))
    shard = inspect.getsource(BatchSamplerShard)
    for name in ("batch_sampler", "batch_size", "drop_last", "even_batches", "num_processes", "split_batches"):
        assert f"self.{name} = " in shard
    assert hasattr(GradientState, "end_of_dataloader") and hasattr(GradientState, "remainder")


def test_the_one_trainer_overrides_six_private_methods_each_with_its_reason():
    assert PrefixTrainer.__bases__ == (Seq2SeqTrainer,)
    private = {name for name in vars(PrefixTrainer) if re.match("_[a-z]", name) and hasattr(Seq2SeqTrainer, name)}
    assert private == set(OVERRIDDEN) and len(private) <= 6
    for name in private:
        assert "Overridden" in vars(PrefixTrainer)[name].__doc__, name


def test_no_other_private_name_of_the_trainer_is_used():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in TRAINING.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    set_by_stock = set(re.findall(r"\bself\.(_[a-z_]+) = ", inspect.getsource(Trainer)))
    used = {node.attr for node in nodes if re.match("_[a-z]", node.attr)}
    relied_on = {name for name in used if hasattr(Seq2SeqTrainer, name) or name in set_by_stock}
    assert relied_on <= set(OVERRIDDEN) | set(CALLED) | ATTRIBUTES
    assert set(CALLED) | ATTRIBUTES <= relied_on
