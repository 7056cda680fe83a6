"""On-policy, SpecKD, SKD, both together, and the controls that make a gate's effect believable, on the same budget.

    python examples/offline_assets.py --output_dir examples/assets
    python examples/compare_methods.py --assets examples/assets --output_dir runs/methods --processes 2

Every arm starts from the same student, sees the same prompts in the same order and stops after the same number of response
tokens, under the same seeds, on the CPU. Each run leaves a JSON file, so a killed comparison goes on where it was; other
options need another `--output_dir`. At the end: a table (`methods.md`) and a plot of the token acceptance rate over training
(`token_acceptance_rate.png`).

All arms are `SpecKDTrainer`, the ungated ones with a gate of weight 1 everywhere (which the tests show to be the ungated loss
to the last bit), so the acceptance rate is known for all of them. Between arms the paired differences count: the
interval is a bootstrap of the mean over seeds, which draws both prompts and seeds.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


GATE = {"gate": "greedy_top_k", "gate_top_k": 5, "gate_floor": 0.01}
UNGATED = {"gate": "greedy_top_k", "gate_top_k": 5, "gate_floor": 1.0}
ARMS = {
    "on-policy": {"rollout": "student", **UNGATED},
    "SpecKD": {"rollout": "student", **GATE},
    "random gate": {"rollout": "student", **GATE, "gate_control": "random"},
    "inverted gate": {"rollout": "student", **GATE, "gate_control": "inverted"},
    "same mean weight": {"rollout": "student", **GATE, "gate_control": "same_mean"},
    "SKD": {"rollout": "interleaved", **UNGATED},
    "SKD + SpecKD": {"rollout": "interleaved", **GATE},
}
CONTROLS = ("random gate", "inverted gate", "same mean weight")
# Options that say how a comparison is carried out, not what is compared.
FREE = ("output_dir", "seeds", "processes", "threads", "run")
METRICS = {
    "kl_teacher_text": "KL, teacher's text",
    "kl_student_samples": "KL, own samples",
    "rougeL_teacher": "ROUGE-L to teacher",
}


def main(options: argparse.Namespace) -> None:
    if options.run is not None:
        run_arm(options, *options.run)
        return
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    keep_to_one_recipe(output_dir / "options.json", options)
    runs = [("before", 0)] + [(arm, seed) for seed in range(options.seeds) for arm in ARMS]
    start = time.perf_counter()
    run_all([run for run in runs if not result_file(options, *run).exists()], options)
    results = {run: json.loads(result_file(options, *run).read_text()) for run in runs}
    text = table(results, options)
    (output_dir / "methods.md").write_text(text)
    plot_acceptance(results, options, output_dir / "token_acceptance_rate.png")
    print(
        f"{text}\n{time.perf_counter() - start:.0f} s; {output_dir / 'methods.md'}, {output_dir}/token_acceptance_rate.png"
    )


def keep_to_one_recipe(path: Path, options: argparse.Namespace) -> None:
    """Results of other options in the same directory are not to be mixed with these."""
    recipe = {name: value for name, value in vars(options).items() if name not in FREE}
    if path.exists() and (found := json.loads(path.read_text())) != recipe:
        differing = {name: (found.get(name), value) for name, value in recipe.items() if found.get(name) != value}
        sys.exit(
            f"error: {path.parent} holds runs with other options (there, here): {differing}. Give another --output_dir, or "
            "the options of before."
        )
    path.write_text(json.dumps(recipe))


def run_all(runs: list[tuple[str, int]], options: argparse.Namespace) -> None:
    """Each run in its own process, `options.processes` at once; the first failure ends the comparison."""
    waiting, running = list(runs), {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    try:
        while waiting or running:
            while waiting and len(running) < options.processes:
                arm, seed = waiting.pop(0)
                command = [sys.executable, __file__, *sys.argv[1:], "--run", arm, str(seed)]
                log = result_file(options, arm, seed).with_suffix(".log").open("w")
                running[subprocess.Popen(command, env=environment, stdout=log, stderr=log)] = (arm, seed, time.time())
            time.sleep(0.5)
            for process in [p for p in running if p.poll() is not None]:
                arm, seed, start = running.pop(process)
                print(f"{arm}, seed {seed}: {time.time() - start:.0f} s, {len(waiting)} waiting", flush=True)
                if process.returncode:
                    raise RuntimeError(
                        f"{arm}, seed {seed} failed: see {result_file(options, arm, seed)}".replace("json", "log")
                    )
    finally:
        for process in running:
            process.kill()


def run_arm(options: argparse.Namespace, arm: str, seed: str) -> None:
    """Trains one arm with one seed and writes its scores on the held-out prompts; `before` only scores the student."""
    from datasets import disable_progress_bars
    from summarization_data import load_summarization
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from skd_trl import SpecKDConfig, SpecKDTrainer
    from skd_trl.evaluation.held_out import Decoding, held_out
    from skd_trl.evaluation.scores import Evaluation, evaluate
    from skd_trl.evaluation.text_metrics import text_metrics
    from skd_trl.evaluation.texts import generate

    class StopAtBudget(TrainerCallback):
        """Ends training at the first step that reaches the budget of response tokens."""

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = trainer.num_response_tokens >= options.token_budget

    class CountingTrainer(SpecKDTrainer):
        num_response_tokens = 0

        def get_batch_samples(self, *arguments):
            batches, divisor = super().get_batch_samples(*arguments)
            self.num_response_tokens += sum(int((batch["labels"] != -100).sum()) for batch in batches)
            return batches, divisor

    disable_progress_bars()
    assets = Path(options.assets)
    tokenizer = AutoTokenizer.from_pretrained(assets / "teacher")
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(assets / name, dtype="float32") for name in ("teacher", options.student)
    )
    outcome: dict = {"arm": arm, "seed": int(seed)}
    if arm != "before":
        trainer = CountingTrainer(
            model=student,
            teacher_model=teacher,
            args=SpecKDConfig(
                output_dir=str(Path(options.output_dir) / "trainers"),
                seed=int(seed),
                data_seed=int(seed),
                per_device_train_batch_size=options.batch_size,
                max_steps=10_000,
                max_new_tokens=options.max_new_tokens,
                max_length=384,
                num_draft_tokens=3,
                accept_top_k=25,
                temperature=1.0,
                student_top_p=1.0,
                teacher_temperature=1.0,
                teacher_top_p=1.0,
                learning_rate=2e-4,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=5,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                disable_tqdm=True,
                **ARMS[arm],
            ),
            train_dataset=load_summarization(str(assets / "text"), "train"),
            processing_class=tokenizer,
            callbacks=[StopAtBudget()],
        )
        trainer.train()
        keys = ("loss", "token_acceptance_rate", "gate_weight", "replaced_share", "response_length")
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        outcome |= {
            "num_tokens": trainer.num_response_tokens,
            "num_steps": trainer.state.global_step,
            "history": [{key: entry[key] for key in keys if key in entry} for entry in history],
        }
    rows = load_summarization(str(assets / "text"), "test", num_rows=options.num_eval_rows)
    decoding = Decoding.of(tokenizer, student, teacher, options.max_new_tokens, 16)
    data = held_out(rows, tokenizer, decoding.eos_token_ids)
    answers_file = Path(options.output_dir) / "teacher_answers.json"
    if arm == "before":  # the first run: later ones read what it wrote
        answers = generate(teacher, data.prompt_ids, decoding=decoding, description="teacher")
        answers_file.write_text(json.dumps(answers))
    elif answers_file.exists():
        answers = json.loads(answers_file.read_text())
    else:
        answers = generate(teacher, data.prompt_ids, decoding=decoding, description="teacher")
    evaluation = Evaluation(tokenizer, decoding, text_metrics(["rouge"]))
    scores = evaluate(student, teacher, data, answers, evaluation=evaluation, name=arm)
    outcome["scores"] = {name: scores.values[name].tolist() for name in METRICS}
    partial = result_file(options, arm, seed).with_suffix(".partial")
    partial.write_text(json.dumps(outcome))
    partial.replace(result_file(options, arm, seed))


def result_file(options: argparse.Namespace, arm: str, seed: int | str) -> Path:
    return Path(options.output_dir) / f"{arm.replace(' ', '_')}-{seed}.json"


def table(results: dict, options: argparse.Namespace) -> str:
    """Markdown: each arm's metrics, mean over seeds with the seeds' spread, and the paired difference to on-policy."""
    seeds = range(options.seeds)
    generator = np.random.default_rng(0)
    resamples = generator.integers(options.num_eval_rows, size=(2000, options.num_eval_rows))
    resampled_seeds = generator.integers(options.seeds, size=(options.seeds, 2000))
    everything = np.arange(options.num_eval_rows)[None]

    def metric(arm: str, name: str, rows: np.ndarray, of: range) -> np.ndarray:
        """(seeds, resamples): the metric of each seed on each choice of prompts."""
        values = np.array([results[arm, seed]["scores"][name] for seed in of])  # (seeds, prompts, 2)
        total, weight = np.moveaxis(values[:, rows].sum(axis=2), -1, 0)
        return total / np.maximum(weight, 1e-9)

    def difference(arm: str, other: str, name: str) -> str:
        pairs = metric(arm, name, resamples, seeds) - metric(other, name, resamples, seeds)  # (seeds, resamples)
        low, high = np.quantile(np.take_along_axis(pairs, resampled_seeds, axis=0).mean(0), (0.025, 0.975))
        whole = metric(arm, name, everything, seeds) - metric(other, name, everything, seeds)
        return f"{whole.mean():+.3f}, {low:+.3f} to {high:+.3f}"

    lines = [
        "| arm | " + " | ".join(METRICS.values()) + " | TAR, first to last fifth | mean weight | replaced | steps |",
        "|---" * (len(METRICS) + 5) + "|",
    ]
    before = [f"{metric('before', name, everything, range(1)).mean():.3f}" for name in METRICS]
    lines.append(f"| before | {' | '.join(before)} | | | | |")
    for arm in ARMS:
        cells = []
        for name in METRICS:
            per_seed = metric(arm, name, everything, seeds)[:, 0]
            cell = f"{per_seed.mean():.3f} ± {per_seed.std(ddof=1) if len(per_seed) > 1 else 0:.3f}"
            if arm != "on-policy":
                cell += f" ({difference(arm, 'on-policy', name)})"
            cells.append(cell)
        histories = [results[arm, seed]["history"] for seed in seeds]
        rates = [acceptance_rates(arm, history) for history in histories]
        fifths = [(np.mean(r[: max(len(r) // 5, 1)]), np.mean(r[-max(len(r) // 5, 1) :])) for r in rates]
        first, last = np.mean(fifths, axis=0)
        weight = np.mean([np.mean([entry["gate_weight"] for entry in history]) for history in histories])
        replaced = np.mean([np.mean([entry.get("replaced_share", 0.0) for entry in history]) for history in histories])
        steps = np.mean([results[arm, seed]["num_steps"] for seed in seeds])
        cells += [f"{first:.2f} to {last:.2f}", f"{weight:.2f}", f"{replaced:.2f}", f"{steps:.0f}"]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    controls = []
    for name, label in METRICS.items():
        differences = [f"{arm} {difference('SpecKD', arm, name)}" for arm in CONTROLS]
        controls.append(f"{label}: {'; '.join(differences)}.")
    note = (
        f"\n{options.seeds} seeds; {options.token_budget} response tokens each, {options.batch_size} prompts a step; "
        f"{options.num_eval_rows} held-out prompts; student `{options.student}`. KL(teacher || student) in nats per token, "
        "lower is better; mean ± standard deviation over seeds; in brackets the difference to on-policy with its 95% "
        f"bootstrap interval over prompts and seeds.\n\nSpecKD less its controls: {' '.join(controls)}\n"
    )
    return "\n".join(lines) + "\n" + note


def acceptance_rates(arm: str, history: list[dict]) -> list[float]:
    """The share of tokens that the greedy top-5 gate would let through, step by step, also for the controls made of it:
    they report their own share, and their mean weight tells that gate's."""
    if arm == "inverted gate":
        return [1 - entry["token_acceptance_rate"] for entry in history]
    if arm == "same mean weight":
        floor = ARMS[arm]["gate_floor"]
        return [(entry["gate_weight"] - floor) / (1 - floor) for entry in history]
    return [entry["token_acceptance_rate"] for entry in history]


def plot_acceptance(results: dict, options: argparse.Namespace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for arm in ARMS:
        rates = [acceptance_rates(arm, results[arm, seed]["history"]) for seed in range(options.seeds)]
        shortest = min(map(len, rates))
        mean = np.mean([rate[:shortest] for rate in rates], axis=0)
        smooth = np.convolve(np.pad(mean, 2, mode="edge"), np.ones(5) / 5, mode="valid")
        axes.plot(np.arange(1, shortest + 1), smooth, label=arm)
    axes.set(xlabel="optimizer step", ylabel="token acceptance rate (greedy top 5)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"The student's favourite among the teacher's five, mean of {options.seeds} seeds, over 5 steps")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--assets", default="examples/assets")
    parser.add_argument("--student", default="student-20", help="folder of the student in --assets")
    parser.add_argument("--output_dir", default="runs/methods")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--token_budget", type=int, default=3000, help="response tokens that each run trains on")
    parser.add_argument("--batch_size", type=int, default=4, help="prompts in an optimizer step")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--num_eval_rows", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2, help="runs at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--run", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    main(parser.parse_args())
