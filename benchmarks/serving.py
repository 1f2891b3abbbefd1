"""What `kmixer serve` makes of a core: tokens per second of many streams beside the prepared step alone, in the
same run, and the time to the first token of a prompt whose beginning is known.

    python benchmarks/serving.py [--model shakespeare-small] [--streams 64] [--tokens 512] [--rounds 3] [--json]

The server is a process of its own on the first core that this one may use, the clients on the others where there are.
Prints what was measured, step and server in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

import kmixer
from kmixer.generation.rows import RowDecoder

SERVE = "import sys; from kmixer.cli.main import run; sys.exit(run(sys.argv[1:]))"
SETTLED = 30  # steps before the clock


def step_alone(model: kmixer.LanguageModel, rows: int, steps: int) -> tuple[float, float]:
    """Tokens per second of the prepared step, without drawing, by the clock and by processor time."""
    decoder, begun, used = RowDecoder(model, rows), 0.0, 0.0
    tokens = torch.zeros(rows, dtype=torch.int64)
    for index in range(SETTLED + steps):
        if index == SETTLED:
            begun, used = time.perf_counter(), time.thread_time()
        decoder.step(tokens)
    return rows * steps / (time.perf_counter() - begun), rows * steps / (time.thread_time() - used)


class Client:
    """Just enough HTTP to leave the machine to the server."""

    def __init__(self, port: int, model: str) -> None:
        self._port, self._model = port, model

    async def complete(self, prompt: str, tokens: int, seed: int) -> tuple[float, str]:
        """Seconds to the first text, and the whole."""
        body = json.dumps(
            {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": tokens,
                "seed": seed,
                "temperature": 0.8,
                "stream": True,
            }
        ).encode()
        begun = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 22)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
        answer, first = bytearray(), 0.0
        while part := await reader.read(1 << 16):
            answer += part
            if not first and b"data: " in answer:
                first = time.perf_counter() - begun
        writer.close()
        lines = [line for line in answer.split(b"\n") if line.startswith(b"data: {")]
        return first, "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines)


async def many(client: Client, streams: int, tokens: int) -> tuple[float, list[str]]:
    """Tokens per second of so many streams at once, and their texts."""
    begun = time.perf_counter()
    answers = await asyncio.gather(*(client.complete("KING RICHARD:\n", tokens, seed) for seed in range(streams)))
    return streams * tokens / (time.perf_counter() - begun), [text for _, text in answers]


async def known_prefix(client: Client, rounds: int) -> list[float]:
    """Seconds to the first token of prompts of 1,000 tokens with the same first 768, which were read before."""
    shared = ("KING RICHARD:\nNow is the winter of our discontent made glorious summer by this sun of York.\n" * 20)[
        :800
    ]
    await client.complete(shared + "a" * 200, 1, 0)
    return [(await client.complete(shared + "abcdefghij"[turn % 10] * 200, 1, 0))[0] for turn in range(rounds)]


def seconds_of(process: int) -> float:
    """Processor time of a process so far."""
    with open(f"/proc/{process}/stat") as file:  # noqa: PTH123
        parts = file.read().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    model = kmixer.load(arguments.model)
    torch.set_num_threads(1)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, "serve", arguments.model, "--port", "0", "--rows", str(arguments.streams)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores[:1]),
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().split(" (")[0].rpartition(":")[2])
        client = Client(port, arguments.model)
        alone, served, used = [], [], []
        asyncio.run(many(client, arguments.streams, 16))
        for _ in range(arguments.rounds):
            os.sched_setaffinity(0, cores[:1])
            alone.append(step_alone(model, arguments.streams, arguments.tokens))
            os.sched_setaffinity(0, cores[1:] or cores)
            before = seconds_of(server.pid)
            rate, texts = asyncio.run(many(client, arguments.streams, arguments.tokens))
            assert all(len(text) >= arguments.tokens for text in texts)
            served.append(rate)
            used.append(arguments.streams * arguments.tokens / (seconds_of(server.pid) - before))
        first = asyncio.run(known_prefix(client, 4 * arguments.rounds))
    finally:
        server.terminate()
        code = server.wait(30)
    return {
        "model": arguments.model,
        "streams": arguments.streams,
        "tokens": arguments.tokens,
        "step_tokens_per_second": statistics.median(a for a, _ in alone),
        "step_tokens_per_processor_second": statistics.median(a for _, a in alone),
        "served_tokens_per_second": statistics.median(served),
        "served_tokens_per_processor_second": statistics.median(used),
        "part_of_step": statistics.median(s / a for s, (a, _) in zip(served, alone, strict=True)),
        "part_of_step_by_processor_time": statistics.median(u / a for u, (_, a) in zip(used, alone, strict=True)),
        "first_token_seconds_known_prefix": statistics.median(first),
        "first_token_seconds_known_prefix_worst": max(first),
        "exit_code": code,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shakespeare-small")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"{name.replace('_', ' '):40} {value:,.4g}" if isinstance(value, float) else f"{name:40} {value}")


if __name__ == "__main__":
    main()
