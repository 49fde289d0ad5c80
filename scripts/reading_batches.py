"""
What the reading model is trained on: batches of sheets, and of questions about them to answer or to write.

Each of the questions about a sheet reads the sheet and itself only, so a sheet's keys and values are computed once for
all of them. In some batches the model writes the questions, asked for one by one of the prompts of self-study.
"""

import random
from dataclasses import dataclass

import torch
from reading_sheets import Fact, draw_sheet
from transformers import PreTrainedTokenizerBase

from glm_peft.distillation.seed_prompts import SEED_PROMPTS
from glm_peft.models.chat_formats import get_chat_format

SEEDS = [prompt for prompts in SEED_PROMPTS["zh"].values() for prompt in prompts]
UNKNOWN = "不知道"
SHARE_ASKED = 0.15  # of the batches: the model writes a question itself
SHARE_BARE = 0.04  # of the sheets: not shown, so the answer is not known
SHARE_ALIKE = 0.5  # of the sheets: names alone tell facts apart; of all until they are at their longest
SHARE_ONE_PROMPT = 0.3  # of the sheets: in one prompt with the question; else a whole prompt follows, as with a prefix
MOST_ROWS = 32  # of one sheet
MOST_ASKED = 12
TOKENS_PER_FACT, TOKENS_PER_ROW, TOKENS_PER_ASKED = 9, 13, 37  # about
FRAME = 2  # the tokens that begin every prompt
QUESTION = 6  # the tokens before a question
IGNORED = -100
SHARE_WHOLE = 0.6  # of the sheets; the others are parts, without title and headings


@dataclass
class Batch:
    """What stands before the questions, and rows to go on with: the same number for each start, one after another."""

    starts: torch.Tensor  # ids, padded on the left
    start_mask: torch.Tensor
    rows: torch.Tensor  # ids, padded on the right
    labels: torch.Tensor
    asked: bool  # whether the rows are questions to write


class ReadingText:
    """
    Batches without end.

    Args:
        tokens: in a batch, of sheets and questions together.
        most_facts: of the longest sheets that there will be.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: int, most_facts: int, seed: int) -> None:
        self.tokenizer, self.tokens, self.most_facts = tokenizer, tokens, most_facts
        self.chooser = random.Random(seed)
        self.chat_format = get_chat_format(tokenizer)

    def draw_batch(self, most_facts: int) -> Batch:
        """
        A batch of sheets of about the same length, all rows of which are questions to answer, or to write.

        Until sheets are at their longest, names alone tell facts apart, and every question is answered from the sheet.
        """
        grown = most_facts == self.most_facts
        num_facts = self.chooser.randint(max(most_facts // 4, 2), most_facts)
        asked = grown and self.chooser.random() < SHARE_ASKED
        num_rows = min(num_facts, MOST_ASKED if asked else MOST_ROWS)
        tokens = TOKENS_PER_FACT * num_facts + (TOKENS_PER_ASKED if asked else TOKENS_PER_ROW) * num_rows
        starts, rows = [], []
        for _ in range(max(self.tokens // tokens, 1)):
            whole, alike = self.chooser.random() < SHARE_WHOLE, not grown or self.chooser.random() < SHARE_ALIKE
            sheet = draw_sheet(self.chooser, num_facts, whole=whole, alike=alike)
            bare = grown and not asked and self.chooser.random() < SHARE_BARE
            starts.append(self.encode_prompt(UNKNOWN)[:QUESTION] if bare else self._draw_start(sheet.text))
            rows += [self._draw_row(fact, asked, bare) for fact in self.chooser.sample(sheet.facts, num_rows)]
        return _collate(starts, rows, asked)

    def encode_prompt(self, question: str, text: str | None = None) -> list[int]:
        """The prompt of a question, with the text as the system's message where there is one."""
        system = [] if text is None else [{"role": "system", "content": text}]
        return self.chat_format.encode_prompt(self.tokenizer, [*system, {"role": "user", "content": question}]).ids

    def encode_text(self, text: str) -> list[int]:
        """The ids that stand before a prompt that is whole by itself."""
        return self.encode_prompt("", text)[: FRAME - len(self.encode_prompt(""))]

    def _draw_start(self, text: str) -> list[int]:
        begin = FRAME if self.chooser.random() < SHARE_ONE_PROMPT else 0
        return self.encode_text(text) + self.encode_prompt(UNKNOWN)[begin:QUESTION]

    def _draw_row(self, fact: Fact, asked: bool, bare: bool) -> tuple[list[int], list[int]]:
        """The ids of a question, and those of its answer."""
        question, answer = self.chooser.choice(fact.questions), UNKNOWN if bare else fact.answer
        if asked:
            question, answer = self.chooser.choice(SEEDS), self.chooser.choice(fact.questions[:-1])
        answer = self.chat_format.encode_answer(self.tokenizer, answer).ids
        return self.encode_prompt(question)[QUESTION:], answer


def _collate(starts: list[list[int]], rows: list[tuple[list[int], list[int]]], asked: bool) -> Batch:
    width, length = max(map(len, starts)), max(len(prompt) + len(answer) for prompt, answer in rows)
    labels = [[IGNORED] * len(prompt) + answer for prompt, answer in rows]
    return Batch(
        starts=torch.tensor([[0] * (width - len(ids)) + ids for ids in starts]),
        start_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in starts]),
        rows=torch.tensor([prompt + answer + [0] * (length - len(prompt + answer)) for prompt, answer in rows]),
        labels=torch.tensor([ids + [IGNORED] * (length - len(ids)) for ids in labels]),
        asked=asked,
    )
