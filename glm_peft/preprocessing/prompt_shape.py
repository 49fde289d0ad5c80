"""Shape a conversation as the model is asked it: `--system_text` and `--source_prefix`."""

from glm_peft.arguments.data import DataArguments
from glm_peft.preprocessing.messages import Message


def shape_prompt(messages: list[Message], data_args: DataArguments) -> list[Message]:
    """Return a conversation as the model is asked it: with the system text, and the prefix before the question."""
    return with_source_prefix(with_system(messages, data_args.system_text), data_args.source_prefix)


def with_system(messages: list[Message], system_text: str | None) -> list[Message]:
    """Return a conversation with a system text where it has none."""
    if not system_text or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_text}, *messages]


def with_source_prefix(messages: list[Message], source_prefix: str | None) -> list[Message]:
    """Return a conversation with a text before its last question."""
    if not source_prefix:
        return messages
    # The last message may be what a tool said to the question.
    place = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=len(messages) - 1)
    question = messages[place]
    asked = {**question, "content": source_prefix + question["content"]}
    return [*messages[:place], asked, *messages[place + 1 :]]
