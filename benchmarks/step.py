"""Whole optimizer steps: SKDTrainer against GKDTrainer's on-policy step, same pair, same rows, fp32.

Both run at their defaults, and at their best settings for this machine: without gradient checkpointing (in GKDTrainer it
also switches off the cache of `generate`). SKDTrainer also with the paper's draft length instead of the automatic one. A step
is everything from one update to the next.

    python benchmarks/step.py
"""

import tempfile

from common import Report, load_model, load_rows, load_tokenizer, median, parser, prepare, spread
from transformers import TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

from skd_trl import SKDConfig, SKDTrainer


ON_POLICY = {"lmbda": 1.0}
ARMS = {
    "SKDTrainer": (SKDTrainer, SKDConfig, {}),
    "SKDTrainer, G = 5": (SKDTrainer, SKDConfig, {"num_draft_tokens": 5}),
    "SKDTrainer, best": (SKDTrainer, SKDConfig, {"gradient_checkpointing": False}),
    "GKDTrainer, best": (GKDTrainer, GKDConfig, {"gradient_checkpointing": False, **ON_POLICY}),
    "GKDTrainer": (GKDTrainer, GKDConfig, ON_POLICY),
}


def main() -> None:
    own = parser(__doc__.splitlines()[0])
    own.add_argument("--batch_size", type=int, default=8)
    own.add_argument("--max_new_tokens", type=int, default=32)
    own.add_argument("--prompt_tokens", type=int, nargs=2, default=[105, 135], help="shortest and longest prompt")
    own.add_argument("--trainers", nargs="+", choices=list(ARMS), default=list(ARMS), help="the first is the unit")
    args = own.parse_args()
    clock = prepare(args)
    rows = prompts_and_completions(args, args.batch_size * (args.repeats + 1))
    report = Report("step", "Whole optimizer steps", args)
    measured = {name: run(args, rows, clock, *ARMS[name]) for name in args.trainers}
    base = median(measured[args.trainers[0]][0])
    report.table(
        f"One step: {args.batch_size} prompts of {args.prompt_tokens[0]} to {args.prompt_tokens[1]} tokens, "
        f"up to {args.max_new_tokens} new",
        [
            "trainer",
            "seconds",
            "spread",
            "relative to the first",
            "response tokens",
            "acceptance",
            "draft length",
            "sampling [s]",
            "training [s]",
        ],
        [
            [
                name,
                median(seconds),
                spread(seconds),
                median(seconds) / base,
                *(logs.get(key, "") for key in METRICS),
            ]
            for name, (seconds, logs) in measured.items()
        ],
        "GKDTrainer trains on the student's own text, SKDTrainer on the interleaved one. Metrics are of the last step, by "
        "wall clock.",
    )


METRICS = ("response_length", "acceptance_rate", "draft_length", "sampling_seconds", "training_seconds")


def run(args, rows, clock, trainer_class, config_class, settings) -> tuple[list[float], dict]:
    """Seconds of each step but the first, and the last step's log."""
    timer = StepTimer(clock)
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_class(
            model=load_model(args, "student"),
            teacher_model=load_model(args, "teacher"),
            args=config_class(
                directory,
                bf16=False,
                use_cpu=True,
                per_device_train_batch_size=args.batch_size,
                gradient_accumulation_steps=1,
                max_steps=args.repeats + 1,
                max_new_tokens=args.max_new_tokens,
                learning_rate=1e-5,
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                dataloader_num_workers=0,
                **settings,
            ),
            train_dataset=rows,
            processing_class=load_tokenizer(args),
            callbacks=[timer],
        )
        trainer.train()
    return timer.seconds[1:], next(log for log in reversed(trainer.state.log_history) if "loss" in log)


class StepTimer(TrainerCallback):
    """From one update to the next, so sampling ahead of a step counts."""

    def __init__(self, clock):
        self.clock, self.seconds = clock, []

    def on_train_begin(self, *args, **kwargs):
        self.last = self.clock()

    def on_step_end(self, *args, **kwargs):
        now = self.clock()
        self.seconds.append(now - self.last)
        self.last = now


def prompts_and_completions(args, count: int):
    """Rows whose prompts have the wanted length, as conversations: the form that both trainers read."""
    tokenizer = load_tokenizer(args)
    shortest, longest = args.prompt_tokens

    def fits(row) -> bool:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        return shortest <= len(prompt) <= longest

    rows = load_rows(args, "train")
    rows = rows.select(range(min(6000, len(rows)))).filter(fits)
    rows = rows.select(range(min(count, len(rows))))
    return rows.map(lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=rows.column_names)


if __name__ == "__main__":
    main()
