"""Generate answers to prompts, the longest first, in batches that do not change a greedy answer."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from glm_peft.errors import UserError
from glm_peft.models.chat_format import ChatFormat
from glm_peft.models.unwrapping import base_of, starts_with_embeddings
from glm_peft.prediction.answer_decoding import decode_answer
from glm_peft.prediction.batch_plan import batch_tokens, own_share, plan_batches
from glm_peft.prediction.decoding import decode
from glm_peft.prediction.generation_settings import GenerationSettings, build_generation_config, choose_batch_size
from glm_peft.prediction.prefix_cache import prefix_computed_once
from glm_peft.preprocessing.collators import GenerationCollator

logger = logging.getLogger(__name__)

# PEFT's `generate` changes the base and puts it back: in two threads at once, answers lose their prefix in silence.
_one_at_a_time = RLock()


@dataclass(frozen=True)
class AnsweredBatch:
    """Answers of a batch: row numbers in the dataset, texts as decoded, generated tokens (end tokens counted)."""

    rows: list[int]
    answers: list[str]
    num_tokens: list[int]


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    chat_format: ChatFormat,
    features: Any,
    settings: GenerationSettings,
    on_batch: Callable[[AnsweredBatch], None] | None = None,
    known_answers: Mapping[int, str] | None = None,
    keep_white_space: bool = False,
    watch: StoppingCriteria | None = None,
    shows_progress: bool = True,
) -> list[str]:
    """
    Generate the model's answer to every prompt, without the prompt, special tokens and what follows the end.

    The model is in evaluation mode meanwhile, and afterwards as it was, as is the state of the random generators. A
    batch that does not fit into the memory of the GPU is cut in halves. Several processes share the batches; several
    threads wait for each other.

    Args:
        features: `GenerationFeatures`, or anything with a column `input_ids` of prompts, such as a dataset.
        on_batch: is called with each batch as soon as it is answered, in the process that answered it.
        known_answers: answers of an earlier run by row number, which are not generated again.
        keep_white_space: return the answers with the white space around them.
        watch: is called with the ids of a batch after each token, and may end its rows.
        shows_progress: draw a bar; off where the caller draws one over many calls.

    Returns:
        One answer for each prompt, in the order of the prompts.

    Raises:
        UserError: a single prompt does not fit into the memory of the GPU.
    """
    prompts = getattr(features, "dataset", features)["input_ids"][:]
    answers = dict(known_answers or {})
    lengths = [len(prompt) for prompt in prompts]
    settings = choose_batch_size(settings, model, lengths)
    mine, filler = own_share(plan_batches(lengths, settings, answers))
    generator = _Generator(model, tokenizer, chat_format, settings, watch)
    is_hidden = not shows_progress or len(prompts) == 1 or watch is not None  # who watches shows the answers
    with _one_at_a_time, _progress(mine, is_hidden) as progress, _ready(model, generator.config):
        for batch in generator.run(mine, prompts):
            answers.update(zip(batch.rows, batch.answers, strict=True))
            progress.update(len(batch.rows))
            if on_batch:
                on_batch(batch)
        for _ in generator.run(filler, prompts):
            pass
    # By row number, so that nothing depends on who answered what, or on how often.
    answers = dict(gather_object(list(answers.items())))
    ordered = [answers[row] for row in range(len(prompts))]
    return ordered if keep_white_space else [chat_format.clean_answer(answer) for answer in ordered]


def _progress(batches: list[list[int]], is_hidden: bool) -> tqdm:
    is_hidden |= not PartialState().is_local_main_process
    return tqdm(total=sum(map(len, batches)), desc="Generating", unit="row", disable=is_hidden)


class _Generator:
    """Generator of answers, batch by batch, which remembers what size of batch was too large for the GPU."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        chat_format: ChatFormat,
        settings: GenerationSettings,
        watch: StoppingCriteria | None = None,
    ) -> None:
        self.model, self.tokenizer, self.chat_format, self.settings = model, tokenizer, chat_format, settings
        self.config = build_generation_config(tokenizer, chat_format, settings)
        self.collate = GenerationCollator(tokenizer)
        self.decoding = _decoding(model, settings)
        if watch is not None:
            self.decoding["stopping_criteria"] = StoppingCriteriaList([watch])
        self.too_many_tokens = float("inf")

    def run(self, batches: list[list[int]], prompts: Sequence[list[int]]) -> Iterator[AnsweredBatch]:
        """Answer the batches; one that was too large comes in halves."""
        waiting = batches[::-1]  # popped from the end
        while waiting:
            rows = waiting.pop()
            batch = self._try(rows, prompts)
            if batch:
                yield batch
            else:
                middle = (len(rows) + 1) // 2
                waiting += [rows[middle:], rows[:middle]]

    def _try(self, rows: list[int], prompts: Sequence[list[int]]) -> AnsweredBatch | None:
        """Answer the rows, or return `None` where they are too many for the GPU's memory."""
        tokens = batch_tokens(len(rows), len(prompts[rows[0]]), self.settings)
        if tokens >= self.too_many_tokens and len(rows) > 1:
            return None
        try:
            return self._answer(rows, [prompts[row] for row in rows])
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise UserError(_too_large(rows[0], len(prompts[rows[0]]), self.settings)) from error
        # Outside of `except`: its traceback holds on to the tensors, and the memory would not be free.
        torch.cuda.empty_cache()
        self.too_many_tokens = tokens
        logger.warning("%d rows at a time are too many for the GPU's memory: going on with half of them.", len(rows))
        return None

    def _answer(self, rows: list[int], prompts: list[list[int]]) -> AnsweredBatch:
        batch, device = self.collate([{"input_ids": prompt} for prompt in prompts]), self.model.device
        # Positions are left to `generate`, which makes them from the mask, or to the model if they have two rows.
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        with _seeded(self.settings, rows[0], device):
            sequences = self.model.generate(**inputs, generation_config=self.config, **self.decoding)
        generated = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        generated = [_until_end(ids, self.config.eos_token_id) for ids in generated]
        answers = [decode_answer(self.tokenizer, self.chat_format, ids) for ids in generated]
        return AnsweredBatch(rows, answers, [len(ids) for ids in generated])


def _until_end(ids: list[int], stops: list[int]) -> list[int]:
    """Return the ids up to the first end token, and it."""
    # What follows it in a shorter row of a batch is padding.
    end = next((index for index, id_ in enumerate(ids) if id_ in stops), len(ids))
    return ids[: end + 1]


def _too_large(row: int, length: int, settings: GenerationSettings) -> str:
    return (
        f"Row {row + 1} alone, with {length} tokens and {settings.max_new_tokens} to come, does not fit into the "
        "memory of the GPU: lower --max_source_length, --max_new_tokens or --num_beams, or load the base with "
        "--quantization_bit."
    )


def _decoding(model: torch.nn.Module, settings: GenerationSettings) -> dict[str, Any]:
    """Choose the arguments by which `generate` decodes: our own loop or transformers'."""
    # Sharded, all processes must call the model until the last of them is done, or they wait for ever.
    if _is_sharded(model):
        return {"synced_gpus": PartialState().num_processes > 1}
    # Beams and models that start from embeddings stay with transformers' loop.
    is_stock = isinstance(base_of(model), GenerationMixin) and not starts_with_embeddings(model)
    return {"custom_generate": decode} if is_stock and settings.num_beams == 1 else {}


def _is_sharded(model: torch.nn.Module) -> bool:
    """Whether each process holds a shard of the parameters only (FSDP)."""
    sharded = (FSDPModule, FullyShardedDataParallel)
    return any(isinstance(module, sharded) for module in model.modules())


@contextmanager
def _ready(model: torch.nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Prepare the model for generating, and put it back afterwards."""
    with ExitStack() as stack:
        stack.enter_context(_evaluation_mode(model))
        stack.enter_context(_in_effect(config, model))
        stack.enter_context(prefix_computed_once(model))
        yield


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and each module back into its own afterwards."""
    # In training mode `generate` crashes under activation checkpointing, and dropout would change the answers.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _in_effect(config: GenerationConfig, model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Set `config` as the model's own generation config, and put the model's back afterwards."""
    # `generate` fills what a given config leaves open with what the base's own says, such as a published `top_p`
    # beside greedy decoding; and PEFT hands a config on only to bases without an inner `model`.
    base = base_of(model)
    owners = [owner for owner in {id(owner): owner for owner in (model, base)}.values() if _owns_config(owner)]
    before = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = config
    try:
        yield
    finally:
        for owner, own_config in zip(owners, before, strict=True):
            owner.generation_config = own_config


def _owns_config(model: torch.nn.Module) -> bool:
    return "generation_config" in vars(model)


@contextmanager
def _seeded(settings: GenerationSettings, first_row: int, device: torch.device) -> Iterator[None]:
    """Seed the random generators by the seed and the batch alone, and restore their states afterwards."""
    if not settings.do_sample:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of_draws(settings.seed, first_row))
        yield


def seed_of_draws(seed: int, first_row: int) -> int:
    """Return the seed of a batch's draws, by the run's seed and the number of the batch's first row."""
    # A digest, as the sum of seed and row would give batches of different seeds the same draws.
    digest = hashlib.sha256(f"{seed} {first_row}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
