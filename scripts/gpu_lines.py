"""The lines of the table of scripts/gpu_check.py: what each of them measures."""

from dataclasses import dataclass

from benchmark_cases import Training
from real_size import SIZES

PLAIN = Training(label_loss=False, prefix_attention=False)


@dataclass(frozen=True)
class Line:
    """What a line of the table measures: steps of training (`step`), `answers`, `serving`, or what is `equal`."""

    kind: str
    generation: str = "chatglm3"
    bits: int | None = None
    rows: int = 16
    lengths: tuple[int, int] = (512, 512)  # tokens of a prompt and of an answer
    attention: str | None = None
    variant: Training = Training()
    differing: bool = False  # rows are up to that long
    packed: bool = False
    stock: bool = False  # answers by PEFT's `generate`


ADGEN, SHORT = (96, 136), (64, 64)  # the lengths of configs/adgen_chatglm3.yaml, and the published ones
CHECKPOINTED = Training(activation_checkpointing=True)
LINES = {
    **{f"equal to the CPU, {generation}": Line("equal", generation) for generation in SIZES},
    "6B, 4 bits, ADGEN recipe": Line("step", bits=4, rows=1, lengths=ADGEN),
    "6B, 4 bits, ADGEN recipe, activation checkpointing": Line("step", "chatglm3", 4, 1, ADGEN, variant=CHECKPOINTED),
    "6B, 16 × 1,024": Line("step"),
    "6B, 16 × 1,024, plain PEFT": Line("step", variant=PLAIN),
    "6B, 16 × 128": Line("step", lengths=SHORT),
    "6B, 16 × 1,024, activation checkpointing": Line("step", variant=CHECKPOINTED),
    "6B, 16 × 1,024, flex": Line("step", attention="flex_attention"),
    "6B, 16 × 1,024, flash": Line("step", attention="flash_attention_2"),
    "6B, lengths that differ": Line("step", differing=True),
    "6B, lengths that differ, packed": Line("step", differing=True, packed=True),
    "6B, 4 bits, 16 × 128": Line("step", bits=4, lengths=SHORT),
    "6B, 4 bits, 16 × 1,024, activation checkpointing": Line("step", bits=4, variant=CHECKPOINTED),
    "9B, 16 × 1,024": Line("step", "glm4"),
    "9B, 4 bits, ADGEN recipe": Line("step", "glm4", bits=4, rows=1, lengths=ADGEN),
    "6B, 1 answer": Line("answers", rows=1, lengths=SHORT),
    "6B, 16 answers": Line("answers", lengths=SHORT),
    "6B, 16 answers, plain PEFT": Line("answers", lengths=SHORT, stock=True),
    "6B, 4 bits, 1 answer": Line("answers", bits=4, rows=1, lengths=SHORT),
    "6B, 4 bits, 16 answers": Line("answers", bits=4, lengths=SHORT),
    "9B, 1 answer": Line("answers", "glm4", rows=1, lengths=SHORT),
    "9B, 16 answers": Line("answers", "glm4", lengths=SHORT),
    "6B, serving 1 client": Line("serving", rows=1),
    "6B, serving 16 clients, three adapters and the base": Line("serving"),
    "6B, 16 × 1,024, torch.compile": Line("step", variant=Training(compiled=True)),
}
