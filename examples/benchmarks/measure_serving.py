"""Measure what a server of many adapters reaches: with batches, without, and one `SpeechAdapter` for each adapter.

    python examples/benchmarks/measure_serving.py --base openai/whisper-tiny.en

Random adapters for classification are saved for the base. Two servers run in processes of their own, one with batches
and one that answers one recording at a time, and clients ask them in turns, so that both meet the same machine. What
is compared are ratios. docs/how-to/serving.md has results.
"""

import argparse
import gc
import io
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import soundfile
from peft import get_peft_model
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForAudioClassification

from peft_elp import ELPConfig
from peft_elp.backbones import has_fixed_window
from peft_elp.speech.inference import SpeechAdapter

CLIENTS, ADAPTERS = (1, 4, 16), (1, 8, 50)
SERVER = "import sys; from peft_elp_command import main; sys.exit(main(sys.argv[1:]))"


def save_adapters(base: str, folder: Path, count: int, clip_s: float) -> list[str]:
    model = AutoModelForAudioClassification.from_pretrained(base, num_labels=4)
    window: dict[str, Any] = {"chunk_length": round(clip_s)} if has_fixed_window(model) else {}
    adapted = get_peft_model(model, ELPConfig(**window))
    names = [f"adapter{number}" for number in range(count)]
    for name in names:
        adapted.save_pretrained(str(folder / name))
    return names


def clip(duration_s: float, rate_hz: int) -> bytes:
    file = io.BytesIO()
    sound = np.random.default_rng(0).normal(scale=0.1, size=round(duration_s * rate_hz))
    soundfile.write(file, sound, rate_hz, format="WAV")
    return file.getvalue()


def memory_mb(process: psutil.Process | None = None) -> float:
    gc.collect()
    return (process or psutil.Process()).memory_info().rss / 1e6


def start(paths: Sequence[str], batch_size: int) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server and wait for it; return it and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--batch-size", str(batch_size)]
    process = subprocess.Popen([sys.executable, "-c", SERVER, "serve", *paths, *options], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        with suppress(httpx.HTTPError):
            httpx.get(f"{url}/healthz").raise_for_status()
            return process, url
        time.sleep(0.2)
    raise RuntimeError("The server did not start.")


def ask(url: str, names: Sequence[str], sound: bytes, clients: int, requests: int) -> tuple[float, list[float]]:
    """Return the requests per second of some clients, and the latency of each request in ms."""
    draw = random.Random(0)
    chosen = [[draw.choice(names) for _ in range(max(1, requests // clients))] for _ in range(clients)]

    def client(models: Sequence[str]) -> list[float]:
        latencies = []
        with httpx.Client(base_url=url, timeout=60) as session:
            for model in models:
                begun = time.perf_counter()
                answer = session.post("/classify", files={"file": ("a.wav", sound)}, data={"model": model})
                answer.raise_for_status()
                latencies.append(1000 * (time.perf_counter() - begun))
        return latencies

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        latencies = [one for found in pool.map(client, chosen) for one in found]
    return len(latencies) / (time.perf_counter() - begun), latencies


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="Folder or Hub name of the encoder.")
    parser.add_argument("--requests", type=int, default=96, help="Requests of a measurement.")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--clip-s", type=float, default=2.0, help="Duration of a recording.")
    parser.add_argument("--adapters", type=int, nargs="+", default=ADAPTERS)
    args = parser.parse_args(argv)
    base = str(Path(args.base).absolute()) if Path(args.base).is_dir() else args.base
    with tempfile.TemporaryDirectory() as folder:
        names = save_adapters(base, Path(folder), max(args.adapters), args.clip_s)
        paths = [str(Path(folder, name)) for name in names]
        sound = clip(args.clip_s, AutoFeatureExtractor.from_pretrained(base).sampling_rate)
        one, many = start(paths[:1], 16), start(paths, 16)
        alone = start(paths, 1)
        single, shared = (memory_mb(psutil.Process(server.pid)) for server, _ in (one, many))
        one[0].terminate()
        of_files = sum(file.stat().st_size for file in Path(paths[0]).iterdir()) / 1e6
        config = AutoConfig.from_pretrained(base)
        print(
            f"{config.model_type}, clips of {args.clip_s:g} s, {os.environ.get('OMP_NUM_THREADS')} threads of PyTorch"
        )
        print(f"memory of a server with 1 adapter {single:.0f} MB, with {len(names)} {shared:.0f} MB: "
              f"{(shared - single) / (len(names) - 1):.1f} MB for each, of {of_files:.1f} MB on disk")  # fmt: skip
        print("| adapters | clients | requests/s | one at a time | ratio | p50 ms | p95 | p99 | one at a time p50 |")
        print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
        for _, url in (many, alone):
            ask(url, names, sound, 4, 16)
        for count in args.adapters:
            for clients in CLIENTS:
                found: dict[str, tuple[list[float], list[float]]] = {many[1]: ([], []), alone[1]: ([], [])}
                for _ in range(args.repeats):
                    for url, (rates, latencies) in found.items():
                        rate, own = ask(url, names[:count], sound, clients, args.requests)
                        rates.append(rate)
                        latencies += own
                (rates, latencies), (rates_alone, latencies_alone) = found.values()
                rate, rate_alone = statistics.median(rates), statistics.median(rates_alone)
                p50, p95, p99 = np.percentile(latencies, [50, 95, 99])
                print(f"| {count} | {clients} | {rate:.1f} | {rate_alone:.1f} | {rate / rate_alone:.2f} | {p50:.0f} "
                      f"| {p95:.0f} | {p99:.0f} | {np.median(latencies_alone):.0f} |", flush=True)  # fmt: skip
        after = memory_mb(psutil.Process(many[0].pid))
        print(f"memory of the server after all requests {after:.0f} MB")
        for server, _ in (many, alone):
            server.terminate()
        before = memory_mb()
        models = [SpeechAdapter.from_pretrained(path, device="cpu") for path in paths[:8]]
        each = (memory_mb() - before) / len(models)
        print(f"one SpeechAdapter for each of {len(models)} adapters: {each:.0f} MB for each")
        recording = {"bytes": sound, "path": None}
        begun = time.perf_counter()
        for number in range(args.requests):
            models[number % len(models)].classify(recording)
        print(f"in a loop, without a server: {args.requests / (time.perf_counter() - begun):.1f} recordings/s")


if __name__ == "__main__":
    main()
