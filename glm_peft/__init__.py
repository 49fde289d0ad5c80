"""P-Tuning v2 for every ChatGLM generation, on PEFT and without remote code.

Importing this package teaches transformers' Auto classes to read the published ChatGLM folders.
"""

from importlib import import_module
from typing import Any

from glm_peft.arguments.command_help import answer_early

answer_early()  # before the models, whose import takes seconds

from glm_peft import models as models  # noqa: E402

__version__ = "0.2.0"

_PUBLIC = {
    "load_adapter": "adapters.loading",
    "attach_prefix_attention": "adapters.prefix_attention",
    "TrainingArguments": "arguments.training",
    "get_chat_format": "models.chat_formats",
    "generate_answers": "prediction.generation",
    "GenerationSettings": "prediction.generation_settings",
    "PrefixTrainer": "training.trainer",
}


def __getattr__(name: str) -> Any:
    # What docs/from_python.md uses, imported when it is asked for: commands answer a wrong flag without PEFT.
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
