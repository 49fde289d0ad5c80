"""
Soaks the server: many mixed requests from many clients, each answer compared with the one of offline prediction.

    python scripts/soak_server.py --generation chatglm3 --requests 2000 --clients 16

Answers come whole or as streams, a fifth of them by draws with a seed. A tenth of the clients leaves in mid-answer, a
twentieth of the requests is malformed. Further flags are the server's, such as `--model_name_or_path BASE --adapters
ads=output/ads`; without a base a tiny one is made, with two prefixes and a LoRA. Prints a Markdown table; exit code 1
where anything is wrong.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import psutil
from soak_requests import MIB, MOST_SECONDS, Request, answer_offline, make_tiny_models, plan_requests
from tiny_options import GENERATIONS
from tqdm import tqdm

FAULTS = ("wrong", "lost", "unexpected", "after the end")
ENDS = ("compared", "left", "ended before it left", "malformed", *FAULTS[:-1])
COLUMNS = ("requests", *ENDS, FAULTS[-1], "MiB at the start", "at 25 %", "at the end", "seconds")


def main() -> None:
    """Starts a server, soaks it, and prints what was found."""
    options, words = parse_arguments()
    with TemporaryDirectory() as folder:
        words = words if "--model_name_or_path" in words else make_tiny_models(Path(folder), options.generation)
        requests = plan_requests(answer_offline(words), options.requests)
        row = asyncio.run(soak(*start_server(words, options.server_log), requests, options.clients))
    for cells in (COLUMNS, ["---"] * len(COLUMNS), [f"{row[name]:,}" for name in COLUMNS]):
        print(f"| {' | '.join(cells)} |")
    sys.exit(any(row[name] for name in FAULTS))


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """What to send, and the words that are the server's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--generation", choices=GENERATIONS, default="chatglm3", help="of the tiny base")
    parser.add_argument("--requests", type=int, default=2000, help="default: 2000")
    parser.add_argument("--clients", type=int, default=16, help="that ask at the same time; default: 16")
    parser.add_argument("--server_log", default="output/soak_server.log", help="default: output/soak_server.log")
    return parser.parse_known_args(argv)


def start_server(words: list[str], log: str) -> tuple[psutil.Popen, str]:
    """Starts the server on a free port; returns the process and its address once it answers."""
    command = [sys.executable, "-m", "glm_peft.serve", *words, "--port", "0"]
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("w") as errors:
        process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    address = next((line for line in process.stdout if line.startswith("address: ")), None)
    if address is None:
        sys.exit(f"error: The server did not start; {log} says why.")
    return process, address.split()[1].removesuffix("/v1")


async def soak(process: psutil.Popen, url: str, requests: list[Request], clients: int) -> Counter[str]:
    """Sends all requests; returns how many ended in which way, and what became of the server."""
    found, start, left = Counter(requests=len(requests)), time.monotonic(), iter(tqdm(requests, desc="server"))
    limits = httpx2.Limits(max_connections=None)
    try:
        async with httpx2.AsyncClient(base_url=url, timeout=MOST_SECONDS, limits=limits) as client:
            before, found["MiB at the start"] = await read_metrics(client), process.memory_info().rss // MIB

            async def ask_on() -> None:
                for request in left:
                    found[await send(client, request)] += 1
                    if sum(found[name] for name in ENDS) == len(requests) // 4:
                        found["at 25 %"] = process.memory_info().rss // MIB

            await asyncio.gather(*(ask_on() for _ in range(clients)))
            found["at the end"], found["seconds"] = process.memory_info().rss // MIB, int(time.monotonic() - start)
            await asyncio.sleep(1)  # the last client may have left just now
            after, health = await read_metrics(client), await client.get("/health")
            found["after the end"] = (after != before) + (health.status_code != 200)
            tqdm.write(f"before: {before}\nafter: {after}")
    finally:
        process.terminate()
        found["after the end"] += await asyncio.to_thread(process.wait, 60) != 0
    return found


async def send(client: httpx2.AsyncClient, request: Request) -> str:
    """Sends a request; returns how it ended, one of `ENDS`."""
    try:
        async with asyncio.timeout(request.leaves_after or MOST_SECONDS):
            status, text = await read_answer(client, request.body)
    except (TimeoutError, httpx2.HTTPError, ValueError, LookupError) as error:
        has_left, status, text = isinstance(error, TimeoutError) and request.leaves_after, 0, repr(error)
        end = request.kind if has_left else "lost"
    else:
        end = "ended before it left" if request.leaves_after else request.kind
        end = end if request.expected in (None, text) else "wrong"
        end = end if request.status == status else "unexpected"
    if end in FAULTS:
        tqdm.write(f"{end}: {str(request)[:1000]}\n  found {status} {text[:1000]}")
    return end


async def read_answer(client: httpx2.AsyncClient, body: Any) -> tuple[int, str]:
    """Sends a request; returns status and text, which of a stream has all pieces to the end."""
    content = body() if callable(body) else json.dumps(body).encode() if isinstance(body, dict) else body
    response = await client.post("/v1/chat/completions", content=content)
    if response.status_code != httpx2.codes.OK:
        return response.status_code, response.json()["error"]["message"]
    if not body["stream"]:
        return response.status_code, response.json()["choices"][0]["message"]["content"]
    *events, last = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    if last != "[DONE]":
        raise ValueError(f"a stream that ends with {last}")
    return response.status_code, "".join(delta.get("content") or "" for delta in deltas)


async def read_metrics(client: httpx2.AsyncClient) -> dict[str, float]:
    """What `/metrics` says of the places, and of requests that the server failed at."""
    text = (await client.get("/metrics")).text
    places = re.findall(r"^glm_peft_(running|waiting|used_slots) (\S+)$", text, re.MULTILINE)
    return dict(places) | {"failed": re.findall(r'.*status="5\d\d".*', text)}


if __name__ == "__main__":
    main()
