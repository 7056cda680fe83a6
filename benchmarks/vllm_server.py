"""A real vLLM as the teacher's server, for checks and benchmarks: ours or its own `vllm serve`, in a process that ends with a
`with` block, and with it all that it started."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import requests


PYTHON = Path(os.environ.get("VLLM_PYTHON", ".venv-vllm/bin/python")).absolute()
START_SECONDS = 600
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]


class VLLMServer:
    """`kind` is "own" or "stock"; `options` are vLLM's own. `port` 0 takes a free one."""

    def __init__(self, kind: str, model: Path, port: int = 0, options: list[str] = OPTIONS):
        with socket.socket() as free:
            free.bind(("127.0.0.1", port))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        own = ["-m", "skd_trl", "serve", "--model", str(model)]
        stock = ["-m", "vllm.entrypoints.cli.main", "serve", str(model), "--max-logprobs", "65"]
        stock += ["--enable-scale-out", "--block-size", "32"]
        self.command = [str(PYTHON), *(own if kind == "own" else stock), "--port", str(self.port), *options]

    def __enter__(self) -> "VLLMServer":
        environment = {**os.environ, "VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        self.process = subprocess.Popen(self.command, env=environment, start_new_session=True)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if requests.get(self.url + "/health", timeout=5).status_code == 200:
                    return self
            except requests.RequestException:
                time.sleep(2)
        self.__exit__()
        raise RuntimeError(f"{' '.join(self.command)} did not start within {START_SECONDS} s.")

    def __exit__(self, *_) -> None:
        for sent in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sent)
                self.process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
