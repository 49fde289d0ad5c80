"""
Send an adapter to the Hub: the adapter, its card, curves and results, and nothing else.

    python -m glm_peft.push ADAPTER --repo_id USER/NAME --dry_run
    python -m glm_peft.push ADAPTER --repo_id USER/NAME --base_model_id THUDM/chatglm3-6b
"""

import logging
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from glm_peft.arguments.push import PushArguments, parse_push_arguments
from glm_peft.errors import UserError
from glm_peft.hub.errors import Unsent
from glm_peft.hub.rights import check_name, check_rights
from glm_peft.hub.upload import Target, send, with_retries
from glm_peft.models.folder_kind import A_PEFT_ADAPTER, check_source
from glm_peft.publishing.card.examples import count_examples
from glm_peft.publishing.files import collect_files, describe_commit, describe_sending, find_base
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.file_names import CARD_NAME
from glm_peft.reporting.log import set_up_logging
from glm_peft.reporting.results import format_bytes, print_section

logger = logging.getLogger("glm_peft.push")


@exit_with_user_errors()
def main(argv: list[str] | None = None, sleep: Callable[[float], object] = time.sleep) -> None:
    """
    Send the adapter that the arguments name, or show its files with `--dry_run`.

    Args:
        sleep: waits for a number of seconds between attempts.
    """
    words = sys.argv[1:] if argv is None else argv
    adapter, arguments = parse_push_arguments(words)
    set_up_logging()
    if arguments.repo_id:
        check_name(arguments.repo_id, "--repo_id")
    check_source(adapter, "ADAPTER", A_PEFT_ADAPTER)
    # Before any request: a base that is a local folder needs an id, and nothing is to be created until it has one.
    base = find_base(adapter, arguments.base_model_id)
    title = arguments.commit_message or describe_commit(adapter, base)
    if arguments.dry_run:
        show(collect(adapter, base, arguments.repo_id, arguments), arguments.repo_id, title)
        return
    try:
        print(push(adapter, base, title, arguments, sleep))
    except Unsent as unsent:
        command = shlex.join(["python", "-m", "glm_peft.push", *words])
        said = f"The adapter could not be sent ({unsent}) and is in {adapter} as before; this command sends it later:"
        raise UserError(f"{said}\n{command}") from unsent


def collect(adapter: str, base: str, repo_id: str | None, arguments: PushArguments) -> dict[str, bytes]:
    """Collect the files to send, see `collect_files`, and say in the log what will be public."""
    files = collect_files(adapter, base, repo_id, arguments.card_language, arguments.card_examples)
    logger.info("%s", describe_sending(files, repo_id, count_examples(Path(adapter), arguments.card_examples)))
    return files


def show(files: dict[str, bytes], repo_id: str | None, title: str) -> None:
    """Print the names and sizes of the files, and the card."""
    width = max(map(len, files))
    lines = [f"  {name:<{width}}  {format_bytes(len(content)):>10}" for name, content in files.items()]
    total = format_bytes(sum(map(len, files.values())))
    print_section(f"To {repo_id or 'the Hub'}, {len(files)} files, {total}: {title}", "\n".join(lines))
    print_section(f"{CARD_NAME}", files[CARD_NAME].decode())


def push(adapter: str, base: str, title: str, arguments: PushArguments, sleep: Callable[[float], object]) -> str:
    """
    Send an adapter, with retries.

    Args:
        base: the Hub id of the base.
        title: of the commit.

    Returns:
        The URL of the commit.

    Raises:
        UserError: it can never be sent, as it is.
        Unsent: it cannot be sent now.
    """
    # First, as it completes a name without a namespace, and the card tells the adapter's full id.
    repo_id = with_retries(lambda: check_rights(arguments.repo_id), sleep)
    files = collect(adapter, base, repo_id, arguments)
    target = Target(repo_id, arguments.private, arguments.revision, tuple(arguments.tags))
    return with_retries(lambda: send(files, target, title), sleep)


if __name__ == "__main__":
    main()
