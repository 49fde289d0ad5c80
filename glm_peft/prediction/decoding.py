"""Decode, greedily or by sampling, in batches that a row leaves as soon as its answer is finished."""

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

# How far the next position is from the last, by the keyword under which a model takes its positions: of ChatGLM-6B's
# two rows the first stands still behind the prompt.
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
    Decode as transformers' own loop does, but faster: for `generate(custom_generate=decode)` without beams.

    Args:
        input_ids: [b, prompt], padded on the left.
        logits_processor: must not tell rows by their number; those of sampling do not.

    Returns:
        [b, prompt + the longest answer]; a shorter one is padded behind its end.
    """
    # transformers' loop carries finished rows on to the end of the longest; copies the cache, and the scores of the
    # whole vocabulary, at each token; and makes mask and positions anew from the complete sequence.
    if isinstance(model_kwargs.get("past_key_values"), DynamicCache):
        model_kwargs["past_key_values"] = BlockCache()
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    step = _Step(model, inputs)
    answers = _Answers(input_ids, generation_config.pad_token_id)
    while True:
        scores = _process(step.scores(), answers, logits_processor)
        tokens = _choose(scores, generation_config.do_sample)
        answers.add(tokens)
        # One wait for the device a token; the rest of the bookkeeping is on lists.
        finished = stopping_criteria(answers.unfinished, None, rows=answers.rows).tolist()
        if all(finished):
            return answers.all()
        step.append(tokens)
        if any(finished):
            rows = _without(finished)
            answers.keep(rows)
            step.keep(rows)


def _process(scores: torch.Tensor, answers: "_Answers", logits_processor: LogitsProcessorList) -> torch.Tensor:
    """Apply the processors to the scores [b, vocabulary]."""
    if not logits_processor:
        return scores  # greedy decoding spares the copy
    # float32, as in transformers: in bfloat16 many scores are equal, and others would be cut by top-p.
    return logits_processor(answers.unfinished, scores.to(copy=True, dtype=torch.float32))


def _choose(scores: torch.Tensor, do_sample: bool) -> torch.Tensor:
    """Choose a token for each row of scores [b, vocabulary]."""
    if not do_sample:
        return scores.argmax(dim=-1)
    return torch.multinomial(torch.softmax(scores, dim=-1, dtype=torch.float32), num_samples=1).squeeze(1)


def _without(finished: list[bool]) -> list[int]:
    """
    Say which row stands where when the finished ones have left.

    Returns:
        The old number of each row that is left.
    """
    # The last rows take the places of finished ones and the others stay, so that little of the cache is copied.
    num_left = finished.count(False)
    last = [row for row in range(num_left, len(finished)) if not finished[row]]
    return [last.pop() if finished[row] else row for row in range(num_left)]


class _Answers:
    """Sequences from their prompts on; `unfinished` [rows, length] has those that are still in the batch."""

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
        """Return all sequences [b, length] in their first order."""
        self.finished |= dict(zip(self.rows, self.unfinished, strict=True))
        ordered = [self.finished[row] for row in range(len(self.finished))]
        return torch.nn.utils.rnn.pad_sequence(ordered, batch_first=True, padding_value=self.pad_token_id)


class _Step:
    """Inputs of the model for the next token: the last token, mask, positions and cache, carried on in place."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
        self.model, self.inputs, self.mask = model, inputs, inputs.get("attention_mask")
        self.device = inputs["input_ids"].device
        names = [name for name in _NEXT_POSITION if inputs.get(name) is not None]
        self.advances = {name: torch.tensor(_NEXT_POSITION[name], device=self.device) for name in names}

    def scores(self) -> torch.Tensor:
        """Compute the scores [b, vocabulary] of the next token."""
        outputs = self.model(**self.inputs, return_dict=True)
        self.inputs["past_key_values"] = outputs.past_key_values
        return outputs.logits[:, -1].to(self.device)  # a base over several devices has its head on the last one

    def append(self, tokens: torch.Tensor) -> None:
        """Give the tokens [b] to the model next."""
        self.inputs["input_ids"] = tokens[:, None]
        # From the last position, not from the mask's length: the prompt may be padded, or follow a prefix.
        for name, advance in self.advances.items():
            self.inputs[name] = self.inputs[name][..., -1:] + advance
        if self.mask is not None:
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
            self.inputs["attention_mask"] = self._step_mask()

    def keep(self, rows: list[int]) -> None:
        """Keep these rows only, in this order."""
        cache: Cache = self.inputs["past_key_values"]
        cache.batch_select_indices(torch.tensor(rows))
        if self.mask is not None:
            self.mask = self.mask[rows]
        for name in ("input_ids", "attention_mask", *self.advances):
            if self.inputs.get(name) is not None:
                self.inputs[name] = self.inputs[name][rows]

    def _step_mask(self) -> torch.Tensor:
        """Shape the mask [b, s] as attention takes it for one token, where that is known."""
        # A new token sees all before it, so its mask is the padding mask: the model need not build one.
        make_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(self.model.config._attn_implementation)
        if make_mask not in (eager_mask, sdpa_mask):
            return self.mask  # of another attention, such as flash: it takes the 2-D mask or builds its own
        seen = self.mask[:, None, None].bool()
        if make_mask is sdpa_mask:
            return seen
        dtype = self.model.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
