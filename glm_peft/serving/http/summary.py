"""What a server says when it starts: its models, their memory, and how it is asked."""

import json
import shlex
from collections.abc import Iterator, Mapping

from peft import PeftModel

from glm_peft.serving.answerers import BASE, Answerers
from glm_peft.serving.engine import Engine

_MIB = 1 << 20


def describe_server(engine: Engine, adapters: Mapping[str, str], base: str, url: str, key: str | None) -> str:
    """
    Describe a server that is about to listen.

    Args:
        adapters: folder or Hub id of each adapter, by its name.
        base: folder or Hub id of the base.
        url: where it listens.
        key: what a shell puts in its place, such as `$NAME`; `None` where none is needed.

    Returns:
        A table of models, then slots, address and a command that asks the first adapter.
    """
    rows = [
        ("model", "method", "virtual tokens", "memory", "from"),
        *_describe_models(engine.answerers, adapters, base),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    load, name = engine.load(), next(iter(adapters), BASE)
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "你好"}]}, ensure_ascii=False)
    header = f' -H "Authorization: Bearer {key}"' if key else ""
    command = f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} -d {shlex.quote(body)}"
    slots = f"slots for tokens: {load.slots:,}, of which prefixes take {load.used_slots:,}"
    slots = slots if load.slots else "slots for tokens: none, as this generation is answered in ordinary batches"
    return "\n".join([*lines, slots, f"address: {url}/v1 (Ctrl-C ends)", f"ask it: {command}"])


def _describe_models(answerers: Answerers, adapters: Mapping[str, str], base: str) -> Iterator[tuple[str, ...]]:
    sizes = {name: _adapter_bytes(answerers, name) for name in adapters}
    whole = answerers.model.get_memory_footprint()
    in_base = sum(sizes[name] for name in answerers.tuned)
    yield BASE, "", "", f"{(whole - in_base) / _MIB:,.2f} MiB", base
    for name, path in adapters.items():
        model = answerers.by_name[name].model
        config = model.peft_config[answerers.tuned.get(name, model.active_adapter)]
        tokens = str(getattr(config, "num_virtual_tokens", ""))
        yield name, config.peft_type.value.lower(), tokens, f"{sizes[name] / _MIB:,.2f} MiB", path


def _adapter_bytes(answerers: Answerers, name: str) -> int:
    """Return the bytes of an adapter's own parameters."""
    model: PeftModel = answerers.by_name[name].model
    of_peft = answerers.tuned.get(name)
    own = model.prompt_encoder.parameters() if of_peft is None else _tuned_parameters(model, of_peft)
    return sum(parameter.nbytes for parameter in own)


def _tuned_parameters(model: PeftModel, of_peft: str) -> Iterator:
    return (parameter for name, parameter in model.named_parameters() if f".{of_peft}." in f"{name}.")
