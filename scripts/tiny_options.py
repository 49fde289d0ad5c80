"""What a made-up model is to be: its generation, sizes and files, checked against each other."""

import math
from dataclasses import dataclass, field

from tiny_tokenizers import MAIN_FILES
from tiny_weights import FILE_PATTERNS, default_std

from glm_peft.errors import UserError

GENERATIONS = tuple(MAIN_FILES)
DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class ModelOptions:
    """What to make; every field is a flag of the command."""

    output_dir: str = field(metadata={"help": "Folder to write to; it must be new or empty."})
    generation: str = field(metadata={"help": "Which layout to write.", "choices": list(GENERATIONS)})
    hidden_size: int = field(default=64, metadata={"help": "Width of the network."})
    num_layers: int = field(default=2, metadata={"help": "Number of layers."})
    num_heads: int = field(default=4, metadata={"help": "Number of attention heads."})
    num_kv_heads: int | None = field(
        default=None, metadata={"help": "Number of key and value heads (groups); None is 2. Not for chatglm."}
    )
    head_dim: int | None = field(default=None, metadata={"help": "Size of a head; None is hidden_size / num_heads."})
    ffn_size: int | None = field(
        default=None,
        metadata={"help": "Inner size of the MLP; None is the published ratio, rounded up to a multiple of 64."},
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Rows of the embedding table. None: what the tokenizer needs, or its published size."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the weights."})
    std: float | None = field(
        default=None, metadata={"help": "Standard deviation of the matrices; None is 0.02 * sqrt(4096 / hidden_size)."}
    )
    dtype: str = field(default="float32", metadata={"help": "Type of the weights.", "choices": list(DTYPES)})
    format: str = field(default="safetensors", metadata={"help": "Weight files.", "choices": list(FILE_PATTERNS)})
    max_shard_size: str = field(
        default="2GB", metadata={"help": "Largest weight file; a larger model becomes shards."}
    )
    rope_ratio: float | None = field(
        default=None,
        metadata={"help": "The published `rope_ratio`; None is 500 for glm4 and absent before. Not for chatglm."},
    )
    tokenizer_dir: str | None = field(
        default=None, metadata={"help": "Folder with a published tokenizer to copy; None trains a small one."}
    )
    tokenizer_text: str | None = field(
        default=None, metadata={"help": "Text file to train the small tokenizer on; None takes the demo data's text."}
    )

    def __post_init__(self) -> None:
        is_chatglm = self.generation == "chatglm"
        require(self.generation in GENERATIONS, f"--generation {self.generation} is none of {', '.join(GENERATIONS)}.")
        for name in ("hidden_size", "num_layers", "num_heads"):
            require(getattr(self, name) > 0, f"--{name} is {getattr(self, name)}; give 1 or more.")
        for name in ("num_kv_heads", "head_dim", "rope_ratio"):
            given = getattr(self, name)
            require(not is_chatglm or given is None, f"--{name} {given} does not exist in chatglm; leave it out.")
        require(
            self.head_dim is not None or self.hidden_size % self.num_heads == 0,
            f"--hidden_size {self.hidden_size} is no multiple of --num_heads {self.num_heads}; change one of them.",
        )
        self.head_dim = self.head_dim or self.hidden_size // self.num_heads
        require(
            self.head_dim % 4 == 0, f"the size of a head is {self.head_dim}; rotary positions need a multiple of 4."
        )
        # One head cannot have two groups: the default gives way, a number that was asked for does not.
        self.num_kv_heads = self.num_kv_heads or (2 if self.num_heads % 2 == 0 else 1)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"--num_heads {self.num_heads} is no multiple of --num_kv_heads {self.num_kv_heads}; change one of them.",
        )
        # In 4 bits bitsandbytes' kernels take blocks of 64 numbers.
        published = self.hidden_size * (4 if is_chatglm else 13696 / 4096)
        self.ffn_size = self.ffn_size or math.ceil(published / 64) * 64
        self.std = default_std(self.hidden_size) if self.std is None else self.std


def require(holds: bool, message: str) -> None:
    """Raises `UserError(message)` where `holds` is false."""
    if not holds:
        raise UserError(message)
