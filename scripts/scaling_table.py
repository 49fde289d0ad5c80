"""
Memory a GPU and expected speed-up by backend and number of GPUs, as the tables of docs/scaling.md.

    python scripts/scaling_table.py [--tokens 2048 --tera_flops 100 …]

T numbers are trained, in float32; the base has N parameters in B bytes; P is the number of GPUs.

- Memory: that of one process (glm_peft/examination/memory_estimate.py), with what each backend shards. DDP: nothing,
  and 4T bytes more for the buckets of gradients. ZeRO-2: of AdamW's 8T bytes each GPU has 8T/P. FSDP2: B/P of the base
  and 16T/P of what is trained; but embeddings, head and two layers are gathered where they work.
- Bytes that a GPU sends in a step, and receives: in a ring, 2(P-1)/P * 4T for the sum of the gradients, whichever the
  backend (4T with DDP was measured: tests/test_scaling.py); FSDP2 besides gathers the base twice, which is
  (P-1)/P * 2B. No gradient of the base is ever sent: it has none.
- Time of a step: 4 * N * tokens operations (2 forward, 2 backward, as the base's own gradients are not computed), then
  all bytes over the slowest link of the ring, with `hop_seconds` for each hop of each exchange. Nothing overlaps,
  although backends try to: the worst case.
- Speed-up: examples a second against one GPU, where each GPU has as many tokens a step as the one had.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from transformers import GlmConfig, HfArgumentParser, PreTrainedConfig

from glm_peft.examination.memory_estimate import (
    BaseSize,
    Settings,
    base_bytes,
    count_trained,
    estimate_memory,
    measure_base,
)
from glm_peft.models import ChatGLMConfig

MODELS: dict[str, PreTrainedConfig] = {"ChatGLM-6B": ChatGLMConfig(), "GLM-4-9B": GlmConfig()}
NUMBERS_OF_GPUS = (1, 2, 4, 8, 16, 32, 64)
BACKENDS = ("DDP", "ZeRO-2", "FSDP2")
GB = 1e9


@dataclass
class Assumptions:
    """What the tables rest on besides the formulas."""

    tokens: int = field(default=2048, metadata={"help": "Tokens a GPU and step, such as 16 rows of 128."})
    tera_flops: float = field(default=100.0, metadata={"help": "Of a GPU, reached in half precision."})
    gpus_a_machine: int = field(default=8, metadata={"help": "GPUs of a machine."})
    slow_inside: float = field(default=12.0, metadata={"help": "GB/s between GPUs of a machine: PCIe."})
    slow_between: float = field(default=1.25, metadata={"help": "GB/s between machines: 10 Gbit/s."})
    fast_inside: float = field(default=200.0, metadata={"help": "GB/s between GPUs of a machine: NVLink."})
    fast_between: float = field(default=12.5, metadata={"help": "GB/s between machines: 100 Gbit/s."})
    hop_seconds: float = field(default=2e-5, metadata={"help": "Seconds until the first byte of a hop arrives."})

    def rate(self, gpus: int, is_fast: bool) -> float:
        """Bytes a second of the slowest link in a ring of so many GPUs."""
        inside, between = (self.fast_inside, self.fast_between) if is_fast else (self.slow_inside, self.slow_between)
        return GB * (inside if gpus <= self.gpus_a_machine else min(inside, between))


def memory_a_gpu(config: PreTrainedConfig, settings: Settings, base: BaseSize, backend: str, gpus: int) -> float:
    """Bytes that training takes on each GPU."""
    whole = estimate_memory(config, settings, base)
    trained = count_trained(config, settings)
    if gpus == 1:
        return whole.total
    if backend == "DDP":
        return whole.total + 4 * trained
    if backend == "ZeRO-2":
        return whole.total - 8 * trained * (1 - 1 / gpus)
    left = 1 / gpus
    gathered = min(bytes_gathered(config, settings, base), base_bytes(base, settings) * (1 - left))
    return whole.total - (1 - left) * (whole.base + whole.prefix_and_optimizer) + gathered


def bytes_gathered(config: PreTrainedConfig, settings: Settings, base: BaseSize) -> float:
    """Embeddings, head, and the layer at work with the next one, which FSDP2 fetches, in bytes."""
    ends = 2 * config.vocab_size * config.hidden_size * settings.element
    return ends + 2 * (base_bytes(base, settings) - ends) / config.num_hidden_layers


def sent_bytes(trained: int, base: float, backend: str, gpus: int) -> float:
    """
    Bytes that a GPU sends in a step of the optimizer.

    Args:
        trained: numbers that are trained.
        base: bytes of the base.
    """
    gathered = 2 * base if backend == BACKENDS[2] else 0.0
    return (gpus - 1) / gpus * (2 * 4 * trained + gathered)


def speed_up(
    config: PreTrainedConfig, base: BaseSize, backend: str, gpus: int, assumed: Assumptions, is_fast: bool
) -> float:
    """Examples a second against those of one GPU."""
    settings = Settings()
    work = 4 * base.parameters * assumed.tokens / (1e12 * assumed.tera_flops)
    sent = sent_bytes(count_trained(config, settings), base_bytes(base, settings), backend, gpus)
    exchanges = 2 + (2 * config.num_hidden_layers if backend == BACKENDS[2] else 0)
    waiting = sent / assumed.rate(gpus, is_fast) + exchanges * (gpus - 1) * assumed.hop_seconds
    return gpus * work / (work + waiting)


def describe(assumed: Assumptions) -> str:
    """The tables in Markdown, each under the name of its model."""
    return "\n".join(line for name, config in MODELS.items() for line in _table(name, config, assumed))


def _table(name: str, config: PreTrainedConfig, assumed: Assumptions) -> Iterator[str]:
    base, settings = measure_base(config), Settings()
    trained, size = count_trained(config, settings), base_bytes(base, settings)
    numbers = f"{trained / 1e6:.2f} million parameters and {4 * trained / 1e6:.1f} MB of gradients"
    yield (
        f"**{name}**: {base.parameters / 1e9:.2f} billion parameters, {size / GB:.1f} GB; a prefix of "
        f"{settings.num_virtual_tokens} has {numbers}."
    )
    yield ""
    yield "| GPUs | DDP: GB | ZeRO-2: GB | sent, MB | speed-up | FSDP2: GB | sent, GB | speed-up |"
    yield "|---|---|---|---|---|---|---|---|"
    for gpus in NUMBERS_OF_GPUS:
        memory = [f"{memory_a_gpu(config, settings, base, backend, gpus) / GB:.1f}" for backend in BACKENDS]
        sent = [sent_bytes(trained, size, backend, gpus) for backend in BACKENDS]
        speeds = [
            " / ".join(f"{speed_up(config, base, backend, gpus, assumed, is_fast):.1f}" for is_fast in (False, True))
            for backend in BACKENDS
        ]
        whole = [*memory[:2], f"{sent[0] / 1e6:.0f}", speeds[0]]
        cells = [str(gpus), *whole, memory[2], f"{sent[2] / GB:.1f}", speeds[2]]
        yield f"| {' | '.join(cells)} |"
    yield ""


if __name__ == "__main__":
    print(describe(*HfArgumentParser(Assumptions).parse_args_into_dataclasses()))
