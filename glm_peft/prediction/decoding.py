"""Greedy and sampled decoding that rows leave as soon as their answer is finished."""

from typing import Any

import torch
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from glm_peft.prediction.prefix_cache import BlockCache

# What the position after the last is, by the keyword under which a model takes its positions. ChatGLM-6B's first row
# stands still behind the prompt.
_NEXT_POSITION = {"position_ids": 1, "position_rows": [[0], [1]]}


def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> torch.Tensor:
    """
    What stock's own loop gives, for `generate(custom_generate=decode)` without beams.

    Stock's loop carries finished rows on to the end of the longest; copies the cache, and the scores of the whole
    vocabulary, at each token; and makes mask and positions anew from the whole sequence.

    Args:
        input_ids: [b, prompt], padded on the left.
        logits_processor: must not know rows by their number; those of sampling do not.

    Returns:
        [b, prompt + the longest answer]; behind the end of a shorter one is padding.
    """
    if isinstance(model_kwargs.get("past_key_values"), DynamicCache):
        model_kwargs["past_key_values"] = BlockCache()
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    step = _Step(model, inputs)
    answers = _Answers(input_ids, generation_config.pad_token_id)
    while True:
        scores = _process(step.scores(), answers, logits_processor)
        tokens = _choose(scores, generation_config.do_sample)
        answers.add(tokens)
        finished = stopping_criteria(answers.unfinished, None).tolist()
        if all(finished):
            return answers.all()
        step.append(tokens)
        if any(finished):
            rows = _without(finished)
            answers.keep(rows)
            step.keep(rows)


def _process(scores: torch.Tensor, answers: "_Answers", logits_processor: LogitsProcessorList) -> torch.Tensor:
    """[b, vocabulary]; where nothing is to be done with the scores they are not even copied."""
    if not logits_processor:
        return scores
    return logits_processor(answers.unfinished, scores.to(copy=True, dtype=torch.float32))


def _choose(scores: torch.Tensor, do_sample: bool) -> torch.Tensor:
    """[b, vocabulary] -> [b]"""
    if not do_sample:
        return scores.argmax(dim=-1)
    return torch.multinomial(torch.softmax(scores, dim=-1, dtype=torch.float32), num_samples=1).squeeze(1)


def _without(finished: list[bool]) -> list[int]:
    """
    Which row comes where, when the finished ones have left: the last rows take their places, the others stay.

    Returns:
        The old number of each row that is left.
    """
    num_left = finished.count(False)
    last = [row for row in range(num_left, len(finished)) if not finished[row]]
    return [last.pop() if finished[row] else row for row in range(num_left)]


class _Answers:
    """Whole sequences; `unfinished` [rows, length] has those that are still in the batch."""

    def __init__(self, input_ids: torch.Tensor, pad_token_id: int) -> None:
        self.unfinished, self.pad_token_id = input_ids, pad_token_id
        self.rows = list(range(len(input_ids)))
        self.finished: dict[int, torch.Tensor] = {}

    def add(self, tokens: torch.Tensor) -> None:
        self.unfinished = torch.cat([self.unfinished, tokens[:, None]], dim=1)

    def keep(self, rows: list[int]) -> None:
        for index in set(range(len(self.rows))) - set(rows):
            self.finished[self.rows[index]] = self.unfinished[index]
        self.unfinished, self.rows = self.unfinished[rows], [self.rows[index] for index in rows]

    def all(self) -> torch.Tensor:
        """All sequences in their order, [b, length]."""
        self.finished |= dict(zip(self.rows, self.unfinished, strict=True))
        ordered = [self.finished[row] for row in range(len(self.finished))]
        return torch.nn.utils.rnn.pad_sequence(ordered, batch_first=True, padding_value=self.pad_token_id)


class _Step:
    """What goes into the model for the next token: the last token, mask and positions, cache."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
        self.model, self.inputs, self.mask = model, inputs, inputs.get("attention_mask")
        self.device = inputs["input_ids"].device
        names = [name for name in _NEXT_POSITION if inputs.get(name) is not None]
        self.advances = {name: torch.tensor(_NEXT_POSITION[name], device=self.device) for name in names}

    def scores(self) -> torch.Tensor:
        """[b, vocabulary], of the next token."""
        outputs = self.model(**self.inputs, return_dict=True)
        self.inputs["past_key_values"] = outputs.past_key_values
        return outputs.logits[:, -1].to(self.device)

    def append(self, tokens: torch.Tensor) -> None:
        """The tokens [b] become what the model sees next."""
        self.inputs["input_ids"] = tokens[:, None]
        for name, advance in self.advances.items():
            self.inputs[name] = self.inputs[name][..., -1:] + advance
        if self.mask is not None:
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
            self.inputs["attention_mask"] = self._step_mask()

    def keep(self, rows: list[int]) -> None:
        """Only these rows, in this order."""
        cache: Cache = self.inputs["past_key_values"]
        cache.batch_select_indices(torch.tensor(rows))
        if self.mask is not None:
            self.mask = self.mask[rows]
        for name in ("input_ids", "attention_mask", *self.advances):
            if self.inputs.get(name) is not None:
                self.inputs[name] = self.inputs[name][rows]

    def _step_mask(self) -> torch.Tensor:
        """The mask [b, s] as attention takes it for one token, where that is known: the model need not make it."""
        make_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(self.model.config._attn_implementation)
        if make_mask not in (eager_mask, sdpa_mask):
            return self.mask
        seen = self.mask[:, None, None].bool()
        if make_mask is sdpa_mask:
            return seen
        dtype = self.model.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
