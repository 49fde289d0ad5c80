"""
Send an adapter to the Hub: the adapter, its card, curves and results, and nothing else.

    python -m glm_peft.push ADAPTER --repo_id USER/NAME --dry_run
    python -m glm_peft.push ADAPTER --repo_id USER/NAME --base_model_id THUDM/chatglm3-6b
    python -m glm_peft.push --queued [FOLDER]

The last one sends what could not be sent earlier.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm_peft.arguments.push import PushArguments, parse_push_arguments
from glm_peft.errors import UserError
from glm_peft.hub.errors import Unsent
from glm_peft.hub.push_queue import PushQueue, find_queues, how_to_send
from glm_peft.hub.rights import check_name, check_rights
from glm_peft.hub.upload import Target, with_retries
from glm_peft.publishing.files import CARD_NAME, collect_files, describe_commit, find_base
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.files import make_output_dir
from glm_peft.reporting.log import set_up_logging
from glm_peft.reporting.results import format_bytes, print_section

logger = logging.getLogger("glm_peft.push")


@exit_with_user_errors()
def main(argv: list[str] | None = None, sleep: Callable[[float], Any] = time.sleep) -> None:
    """Does what the arguments ask for."""
    adapter, arguments = parse_push_arguments(argv)
    set_up_logging()
    if arguments.queued is not None:
        send_queued(adapter or arguments.queued, sleep)
        return
    if arguments.repo_id:
        check_name(arguments.repo_id, "--repo_id")
    base = find_base(adapter, arguments.base_model_id)
    title = arguments.commit_message or describe_commit(adapter, base)
    if arguments.dry_run:
        show(collect_files(adapter, base, arguments.repo_id, arguments.card_language), arguments, title)
    else:
        push(adapter, base, (arguments, title), sleep)


def show(files: dict[str, bytes], arguments: PushArguments, title: str) -> None:
    """What would be sent, on stdout."""
    width = max(map(len, files))
    lines = [f"  {name:<{width}}  {format_bytes(len(content)):>10}" for name, content in files.items()]
    total = format_bytes(sum(map(len, files.values())))
    where = f"To {arguments.repo_id}" if arguments.repo_id else "To the Hub"
    print_section(f"{where}, {len(files)} files, {total}: {title}", "\n".join(lines))
    print_section(f"{CARD_NAME}", files[CARD_NAME].decode())


def push(adapter: str, base: str, what: tuple[PushArguments, str], sleep: Callable[[float], Any]) -> None:
    """
    Send an adapter, after what waits in its folder from earlier.

    Args:
        base: the Hub id of its base.
        what: the arguments, and the title of the commit.

    Raises:
        UserError: it cannot be sent, now or ever; where it is only now, it waits in its folder.
    """
    arguments, title = what
    repo_id, hindrance = arguments.repo_id, None
    queue = PushQueue(make_output_dir(adapter))
    try:
        repo_id = with_retries(lambda: check_rights(arguments.repo_id), sleep)
    except Unsent as unsent:
        hindrance = unsent
    files = collect_files(adapter, base, repo_id, arguments.card_language)
    target = Target(repo_id, arguments.private, arguments.revision, tuple(arguments.tags))
    entry = queue.add(files, target, title)
    if hindrance:
        raise _waiting(hindrance, adapter)
    try:
        _send(queue, adapter, sleep)
    except UserError as error:
        if not isinstance(error.__cause__, Unsent):
            entry.remove()
        raise


def send_queued(folder: str, sleep: Callable[[float], Any]) -> None:
    """
    Send what waits in a folder and in those inside it.

    Raises:
        UserError: there is no such folder, or something cannot be sent.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--queued {folder} is no folder: give the output folder of a run.")
    queues = find_queues(folder)
    if not queues:
        print(f"Nothing waits in {folder}.")
    for queue in queues:
        _send(queue, str(queue.folder.parent), sleep)


def _send(queue: PushQueue, folder: str, sleep: Callable[[float], Any]) -> None:
    try:
        for address in queue.send_all(sleep):
            print(address)
    except Unsent as unsent:
        raise _waiting(unsent, folder) from unsent
    except KeyboardInterrupt:
        logger.warning("It waits in %s: %s sends it.", folder, how_to_send(folder))
        raise


def _waiting(unsent: Unsent, folder: str) -> UserError:
    return UserError(f"It could not be sent ({unsent}) and waits in {folder}: {how_to_send(folder)} sends it.")


if __name__ == "__main__":
    main()
