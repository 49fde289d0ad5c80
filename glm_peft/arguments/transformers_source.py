"""
Read the argument parser and the Trainer's flags off transformers' source, without its import, which takes seconds.

A command line is judged by them before anything else is imported; what they let pass is parsed again by transformers'
own dataclass, whose types and checks are narrower.
"""

import ast
import builtins
import sys
from collections.abc import Iterator
from dataclasses import field, make_dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Literal


class _Types(dict):
    """What the names in an annotation stand for; enumerations and classes of transformers are any text here."""

    def __missing__(self, name: str) -> type:
        return str


_TYPES = _Types(vars(builtins), Any=Any, Literal=Literal)


def load_argument_parser() -> ModuleType:
    """Return transformers' module `hf_argparser`, which needs nothing of the rest of transformers."""
    name = "transformers.hf_argparser"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, _folder() / "hf_argparser.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trainer_flags(base: type) -> type:
    """
    Return a dataclass with the flags of transformers' `Seq2SeqTrainingArguments`, in plain types.

    Args:
        base: a dataclass whose fields take the place of those of the same name, and whose `check_values` checks them.
    """
    own = base.__dataclass_fields__
    flags = {name: rest for name, *rest in _read_flags() if name not in own}
    stock = make_dataclass("TrainerFlags", [(name, *rest) for name, rest in flags.items()])
    return make_dataclass("TrainingFlags", [], bases=(base, stock), namespace={"__post_init__": base.check_values})


def _read_flags() -> Iterator[tuple[str, Any, Any]]:
    """Yield name, type and field of the flags, those of a subclass behind those of its base."""
    for file in ("training_args.py", "training_args_seq2seq.py"):
        tree = ast.parse((_folder() / file).read_text(encoding="utf-8"))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in [node for one in classes if one.name.endswith("TrainingArguments") for node in one.body]:
            if isinstance(node, ast.AnnAssign):
                values = {keyword.arg: keyword.value for keyword in getattr(node.value, "keywords", [])}
                kind = eval(ast.unparse(node.annotation), {}, _TYPES)  # as dataclasses resolve it
                metadata = values.get("metadata", ast.Dict([], []))
                pairs = zip(metadata.keys, metadata.values, strict=True)
                stated = {_constant(key): _constant(value) for key, value in pairs}
                yield node.target.id, kind, field(default=_constant(values.get("default")), metadata=stated)


def _constant(value: ast.expr | None) -> Any:
    """Return what an expression says outright, and `None` where it is computed."""
    try:
        return ast.literal_eval(value)
    except ValueError:
        return None


def _folder() -> Path:
    return Path(find_spec("transformers").origin).parent
