"""
Chat with a base and its adapters in the terminal; answers are streamed.

    python -m glm_peft.chat --model_name_or_path BASE --adapter_name_or_path ADAPTER

/help lists the commands. From a pipe each line is a question, and only the answers are printed.
"""

import sys

from glm_peft.arguments.chat import parse_chat_arguments
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.log import set_up_logging
from glm_peft.serving.answerers import BASE, open_answerers, parse_adapters
from glm_peft.serving.chat_session import ChatSession
from glm_peft.serving.console import read_questions
from glm_peft.serving.dialogue import Dialogue


@exit_with_user_errors()
def main() -> None:
    """Answer what is typed, or what comes from a pipe, until it ends."""
    model_args, chat_args = parse_chat_arguments()
    set_up_logging()
    adapters = parse_adapters(chat_args.adapters or [], model_args.adapter_name_or_path)
    answerers = open_answerers(model_args, adapters)

    settings = GenerationSettings.from_arguments(chat_args)
    is_typed = sys.stdin.isatty()
    session = ChatSession(answerers, settings, Dialogue(chat_args.system), next(iter(adapters), BASE), is_typed)
    if is_typed:
        session.remark(f"{', '.join(answerers.by_name)} can answer; /help lists the commands, Ctrl-D leaves.")
    for line in read_questions(lambda: f"{session.name}> ", is_typed):
        session.take(line)


if __name__ == "__main__":
    main()
