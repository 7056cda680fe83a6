"""A teacher behind a real vLLM on this machine: what a round costs by route, and a step beside the teacher in this process.

A round sends the texts of a batch with G new tokens each and asks for these. "Stock without" is what everybody sends to
`/v1/completions`: prompt log-probabilities, for which vLLM computes the whole text. Servers take turns, and every arm has texts that no
other one sent. All processes share the cores that this one is given; seconds are by the wall clock.

    VLLM_PYTHON=.venv-vllm/bin/python python benchmarks/served.py
"""

import tempfile
import time

import torch
from common import Report, load_model, load_rows, load_tokenizer, median, parser, prepare, spread
from step import StepTimer, prompts_and_completions
from vllm_server import VLLMServer

from skd_trl import SKDConfig, SKDTrainer
from skd_trl.serving.client import TeacherClient
from skd_trl.serving.routes import CompletionsRoute


TOP_K = 64
DEMO = {
    "accept_top_k": 25, "num_draft_tokens": 3, "temperature": 1.0, "student_top_p": 1.0, "teacher_temperature": 1.0,
    "teacher_top_p": 1.0, "max_new_tokens": 32, "max_length": 384, "per_device_train_batch_size": 8, "bf16": False,
    "gradient_checkpointing": False, "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "report_to": "none",
    "disable_tqdm": True,
}  # fmt: skip


def main() -> None:
    own = parser(__doc__.splitlines()[0], repeats=3, student="student-20")
    own.add_argument("--batch_size", type=int, default=8)
    own.add_argument("--context", type=int, default=600, help="tokens before the first round")
    own.add_argument("--num_draft_tokens", type=int, default=3)
    own.add_argument("--parts", nargs="+", choices=["rounds", "steps"], default=["rounds", "steps"])
    args = own.parse_args()
    prepare(args)
    report = Report("served", "A teacher behind a server", args)
    model = args.assets / args.teacher
    rounds, steps = {}, {}
    with VLLMServer("own", model) as server:
        if "rounds" in args.parts:
            client = TeacherClient(server.url, TOP_K)
            rounds["ours, top 64"] = seconds_of_rounds(args, client, client.score)
            rounds["ours, hidden states"] = seconds_of_rounds(args, client, client.hidden_states)
        if "steps" in args.parts:
            steps["in this process"] = seconds_of_steps(args)
            steps["ours, top 64"] = seconds_of_steps(args, teacher_model_server_url=[server.url])
            steps["ours, hidden states"] = seconds_of_steps(
                args, teacher_model_server_url=[server.url], teacher_signal="hidden_states"
            )
    if steps:
        local = median(steps["in this process"][0])
        report.table(
            "One step of the demo (8 prompts, up to 32 new tokens)",
            ["teacher", "seconds", "spread", "relative to the teacher in this process", "losses"],
            [
                [name, median(seconds), spread(seconds), median(seconds) / local, losses]
                for name, (seconds, losses) in steps.items()
            ],
            "Trainer and server share the cores, so a served teacher takes nothing off this machine. Seeds are equal; draws are at "
            "temperature 1, where those among 64 tokens are others.",
        )
    if "rounds" in args.parts:
        with VLLMServer("stock", model) as server:
            client = TeacherClient(server.url, TOP_K)
            rounds["stock, with its prefix cache"] = seconds_of_rounds(args, client, client.score)
            client.replicas[0].route = CompletionsRoute(client.http, server.url, client.threads, client.info)
            rounds["stock without (/v1/completions)"] = seconds_of_rounds(args, client, client.score)
        slowest = median(rounds["stock without (/v1/completions)"][0])
        report.table(
            f"One round: {args.batch_size} texts of {args.context} tokens, {args.num_draft_tokens} judged, top {TOP_K}",
            ["route", "seconds", "spread", "times as fast as stock without", "bytes a judged token"],
            [
                [name, median(seconds), spread(seconds), slowest / median(seconds), num_bytes]
                for name, (seconds, num_bytes) in rounds.items()
            ],
            "The texts grow by the judged tokens in each round. The first round, which computes the beginnings, is not counted.",
        )


def seconds_of_rounds(args, client: TeacherClient, ask) -> tuple[list[float], int]:
    """Seconds of each round but the first, and bytes of its answers by judged token."""
    tokenizer = load_tokenizer(args)
    stream = [
        i
        for row in load_rows(args, "test").select(range(400))
        for i in tokenizer(row["prompt"][-1]["content"])["input_ids"]
    ]
    generator = torch.Generator().manual_seed(time.time_ns() % 2**31)  # texts that no other arm has sent
    starts = torch.randint(len(stream) - 2 * args.context, (args.batch_size,), generator=generator).tolist()
    first = torch.randint(1000, 40000, (args.batch_size,), generator=generator).tolist()
    sizes: list[int] = []
    client.http.session.hooks["response"] = [lambda response, **_: sizes.append(len(response.content))]
    seconds = []
    for turn in range(args.repeats + 1):
        length = args.context + turn * args.num_draft_tokens
        texts = [[token, *stream[start : start + length - 1]] for token, start in zip(first, starts, strict=True)]
        sizes.clear()
        began = time.perf_counter()
        ask(texts, args.num_draft_tokens, range(args.batch_size))
        seconds.append(time.perf_counter() - began)
    return seconds[1:], sum(sizes) // (args.batch_size * args.num_draft_tokens)


def seconds_of_steps(args, **settings) -> tuple[list[float], str]:
    """Seconds of each step of the demo but the first, and the losses of all."""
    timer = StepTimer(time.perf_counter)
    args.prompt_tokens = [105, 135]
    rows = prompts_and_completions(args, DEMO["per_device_train_batch_size"] * (args.repeats + 1))
    with tempfile.TemporaryDirectory() as directory:
        trainer = SKDTrainer(
            model=load_model(args, "student"),
            teacher_model=None if settings else load_model(args, "teacher"),
            args=SKDConfig(directory, max_steps=args.repeats + 1, **DEMO, **settings),
            train_dataset=rows,
            processing_class=load_tokenizer(args),
            callbacks=[timer],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return timer.seconds[1:], ", ".join(f"{loss:.5f}" for loss in losses)


if __name__ == "__main__":
    main()
