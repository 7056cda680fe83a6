"""What each of several processes runs for `test_distributed.py`: many trainings in one process, results as JSON.

`torchrun ... distributed_worker.py matrix DIR` writes `DIR/<case>-<rank>.json` and, of the trained student, `DIR/<case>.pt`.
Starting a process costs more than all steps of a training, hence one start for many cases.
"""

import argparse
import faulthandler
import gc
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.commands import launch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import launch as launch_utils
from cpu_processes.sitecustomize import fsdp_on_cpu, without_compiler
from datasets import Dataset
from peft import LoraConfig
from processes import HANGS_AFTER
from tiny import byte_tokenizer, tiny_model
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from skd_trl import SKDConfig, SKDTrainer, SpecKDConfig, SpecKDTrainer
from skd_trl.sampling.prefill import cost_of_forward
from skd_trl.training.distributed import student_for_sampling


CONFIGS = Path(__file__).parent.parent / "examples" / "accelerate" / "cpu"
VARIABLES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
MODES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
STUDENT, TEACHER = {"hidden_size": 32}, {"hidden_size": 48, "intermediate_size": 80}
ROWS = [
    {
        "messages": [
            {"role": "user", "content": "q" * (3 + i)},
            {"role": "assistant", "content": "ab" * (1 + (5 * i) % 7)},
        ]
    }
    for i in range(16)
]
SAME_ROWS = [{"messages": [{"role": "user", "content": "qqqq"}, {"role": "assistant", "content": "abab"}]}] * 16
# The second process has all the long rows, and prefills them apart while a forward costs less than 76 tokens of padding.
assert cost_of_forward(torch.device("cpu")) < 76
LONG_ROWS = [
    {"messages": [{"role": "user", "content": "q" * (80 if i % 4 == 3 else 4)}, ROWS[i]["messages"][1]]}
    for i in range(16)
]
# 16 rows, 4 a step: two processes with 2 each, or with 1 each accumulated twice.
# Plain gradient descent, unclipped: updates are then as large as the gradients, and a wrong factor shows.
# With lmbda 0.64 and the default seed steps 0 and 2 take the data set's responses, 1 and 3 sampled ones.
DATASET = {"rollout": "dataset", "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e6, "max_steps": 3}
SAMPLED = {"max_steps": 2}
TWICE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
# Divisors that are known only when both processes' weights are, and a gate that compares the tokens of both.
GATED = {"gate": "greedy_top_k", "gate_top_k": 60, "gate_normalizer": "accepted"}
GATED_POPULATION = {"gate": "student_entropy_top", "gate_normalizer": "mean_one", "gate_floor": 0.1}
RESUMED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lmbda": 0.64, "save_only_model": False, **TWICE}


def matrix() -> dict[str, dict]:
    """Settings by name of the case; names start with the mode."""
    cases = {}
    for mode in MODES:
        cases[f"{mode}-full-dataset"] = {**DATASET, **TWICE}
        cases[f"{mode}-lora-dataset"] = {**DATASET, "lora": True}
        cases[f"{mode}-tied-dataset"] = {**DATASET, "tied": True}
        cases[f"{mode}-full-sampled"] = {**SAMPLED, "uneven": True, "rollout_batch_size": 1}
        cases[f"{mode}-lora-sampled"] = {**SAMPLED, **TWICE, "lora": True}
        cases[f"{mode}-bf16"] = {**SAMPLED, "bf16": True, "lmbda": 0.64}
        cases[f"{mode}-uninterrupted"] = RESUMED
        cases[f"{mode}-killed"] = {**RESUMED, "fails_at": 2}
    for mode in ("ddp", "zero3", "fsdp2"):
        cases[f"{mode}-gated-dataset"] = {**DATASET, **TWICE, **GATED}
        cases[f"{mode}-gated_all-dataset"] = {**DATASET, **TWICE, **GATED, "gate_normalizer": "all"}
        cases[f"{mode}-gated_population-dataset"] = {**DATASET, **TWICE, **GATED_POPULATION}
    for mode in ("zero1", "zero2"):
        cases[f"{mode}-own_engine-sampled"] = {**SAMPLED, "uneven": True, "shard_teacher": True}
    for mode in ("zero3", "fsdp2"):
        cases[f"{mode}-left_sharded-sampled"] = {**SAMPLED, "uneven": True, "ds3_gather_for_generation": False}
        # Each rank measures for itself, and keeps what it has measured.
        saves = {"num_draft_tokens": "auto", "save_strategy": "steps", "save_steps": 2}
        cases[f"{mode}-auto-sampled"] = {**SAMPLED, "uneven": True, **saves}
        cases[f"{mode}-refused_compiling"] = {**DATASET, "compile_student": True, "refused": "compile_student=True"}
        for writer in ("student", "teacher"):
            cases[f"{mode}-{writer}-sampled"] = {**SAMPLED, "uneven": True, "rollout": writer}
        cases[f"{mode}-saved_head-dataset"] = {
            **DATASET,
            "lora": True,
            "lora_kwargs": {"modules_to_save": ["lm_head"]},
        }
        head = {"target_modules": ["q_proj", "lm_head"]}
        cases[f"{mode}-refused_head"] = {**DATASET, "lora": True, "lora_kwargs": head, "refused": "target_modules"}
    for mode in ("ddp", "zero3", "fsdp2"):
        own = {} if mode == "ddp" else {"ds3_gather_for_generation": False}
        per_prompt = {"max_steps": 3, "lmbda": 0.3, "lmbda_unit": "prompt"}
        cases[f"{mode}-per_prompt-sampled"] = {**per_prompt, **own}
        in_turn = {"rows": LONG_ROWS, "train_sampling_strategy": "sequential"}
        cases[f"{mode}-long_prompts-sampled"] = {**SAMPLED, **own, **in_turn}
    for mode in (
        "zero3",
        "fsdp2",
    ):  # gathered, beside a teacher that is whole: a rank without rows has no forward at all
        cases[f"{mode}-per_prompt_gathered-sampled"] = {**per_prompt, "shard_teacher": False}
    # Hybrid decoders: their mixers read a block token by token, and gather their weights for each where these are sharded.
    for mode in MODES:
        both = {"student_architecture": "qwen3_5_text", "teacher_architecture": "qwen3_5_text"}
        # At a rate of 0.1 this pair's gradients grow tenfold in three steps, and roundings with them.
        cases[f"{mode}-hybrid-dataset"] = {**DATASET, **TWICE, **both, "learning_rate": 0.01}
        for which in ("student", "teacher"):
            own = {f"{which}_architecture": "qwen3_5_text"}
            cases[f"{mode}-hybrid_{which}-sampled"] = {**SAMPLED, "uneven": True, **own}
        cases[f"{mode}-hybrid-sampled"] = {**SAMPLED, "uneven": True, **both}
    for mode in ("zero3", "fsdp2"):
        cases[f"{mode}-hybrid_sharded-sampled"] = {
            **cases[f"{mode}-hybrid-sampled"],
            "ds3_gather_for_generation": False,
        }
    for mode in ("ddp", "zero2", "zero3", "fsdp2"):
        resumed = {**RESUMED, "max_steps": 3, "resumes": True}
        cases[f"{mode}-hybrid_resumed"] = {**resumed, **both}
    cases["ddp-same_prompts-sampled"] = cases["ddp-same_prompts_again-sampled"] = {**SAMPLED, "rows": SAME_ROWS}
    cases["ddp-refused_sharding"] = {**DATASET, "shard_teacher": True, "refused": "shard_teacher=True"}
    version = {"FSDP_VERSION": "1", "FSDP_SYNC_MODULE_STATES": "false"}
    cases["fsdp2-refused_version"] = {**DATASET, "environment": version, "refused": "fsdp_version: 2"}
    untied = {
        "lora_kwargs": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "refused": "ensure_weight_tying",
    }
    cases["fsdp2-refused_tying"] = {**DATASET, "lora": True, "tied": True, **untied}
    cases["fsdp2-from_path-dataset"] = {**DATASET, "from_path": True}
    # Models that come into being sharded.
    cases["zero3-from_path-dataset"] = {
        **cases["fsdp2-from_path-dataset"],
        "environment": {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"},
    }
    return cases


class Fails(TrainerCallback):
    """Every rank stops in the middle of a run, as when a machine goes away."""

    def __init__(self, after: int):
        self.after = after

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            raise KeyboardInterrupt


class Misbehaves(TrainerCallback):
    """Rank 1 raises, or goes silent, while the others go on."""

    def __init__(self, how: str):
        self.how = how

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == 1:
            if self.how == "raises":
                raise RuntimeError("rank 1 gives up")
            time.sleep(1000)


class Recorder:
    """Mixed into a trainer: keeps the responses that this rank was trained on."""

    responses: list

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.responses += [row[row != -100].tolist() for row in inputs["labels"]]
        return super().training_step(model, inputs, num_items_in_batch)


class RecordingSKD(Recorder, SKDTrainer):
    pass


class RecordingSpecKD(Recorder, SpecKDTrainer):
    pass


class WholeNumbers(torch.nn.Module):
    """A linear layer whose weights are stored in 8 bits, with their scale on the parameter, as bitsandbytes keeps its state."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.weight.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight * self.weight.scale)


def quantize(model: torch.nn.Module) -> None:
    for layer in model.model.layers:
        layer.mlp.up_proj = WholeNumbers(layer.mlp.up_proj)


def make_trainer(directory: Path, name: str, **settings) -> SKDTrainer:
    lora_kwargs = {"target_modules": "all-linear", **settings.pop("lora_kwargs", {})}
    lora, tied, rows = settings.pop("lora", False), settings.pop("tied", False), settings.pop("rows", ROWS)
    fails_at, uneven = settings.pop("fails_at", None), settings.pop("uneven", False)
    quantized_teacher = settings.pop("quantized_teacher", False)
    student_architecture, teacher_architecture = (
        settings.pop(f"{which}_architecture", "qwen2" if tied else "llama") for which in ("student", "teacher")
    )
    callbacks, eval_rows = settings.pop("callbacks", []), settings.pop("eval_rows", None)
    defaults = {
        "output_dir": str(directory / "runs" / name),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", 1)),
        "max_new_tokens": 8,
        "max_length": 128,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "ddp_timeout": 180,
        "num_draft_tokens": 5,  # "auto" follows a stopwatch, which no comparison should
        "temperature": 1.0,
        "student_top_p": 1.0,
        "teacher_temperature": 1.0,
        "teacher_top_p": 1.0,
        # A tiny one would be whole everywhere.
        "shard_teacher": name.split("-")[0] in ("zero3", "fsdp2") or None,
    }
    if settings.get("rollout") not in ("dataset", "student", "teacher") and "gate" not in settings:
        defaults["accept_top_k"] = 80
    from_path, num_teachers = settings.pop("from_path", False), settings.pop("teachers", 1)
    if from_path:
        student, teacher = (str(directory / which) for which in ("student", "teacher"))
    else:  # before the arguments, from which on ZeRO-3 would shard new models before they have their weights
        student = tiny_model(student_architecture, seed=1, tie_word_embeddings=tied, **STUDENT)
        teacher = tiny_model(teacher_architecture, seed=2, tie_word_embeddings=tied, **TEACHER)
    if quantized_teacher:
        quantize(teacher)
    if num_teachers > 1:
        teacher = {"a": teacher, "b": tiny_model("llama", seed=3, **STUDENT)}
    config_class, trainer_class = (SpecKDConfig, RecordingSpecKD) if "gate" in settings else (SKDConfig, RecordingSKD)
    args = config_class(**{**defaults, **settings})
    trainer = trainer_class(
        model=student,
        teacher_model=None if args.teacher_model_kind else teacher,
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=eval_rows and Dataset.from_list(eval_rows),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, **lora_kwargs) if lora else None,
        callbacks=callbacks + ([Fails(fails_at)] if fails_at is not None else []),
    )
    trainer.responses = []
    if lora:  # B starts at zero, so that A would not move
        for parameter_name, parameter in trainer.model.named_parameters():
            if "lora_B" in parameter_name:
                with torch.no_grad():
                    generator = torch.Generator().manual_seed(len(parameter_name))
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    if uneven:  # rank 0's rows end at their first token, the others' at the limit
        trainer.eos_token_ids = list(range(259)) if trainer.accelerator.process_index == 0 else []
    return trainer


def run(directory: Path, name: str, resume: str | None = None, **settings) -> None:
    mode, start = name.split("-")[0], time.perf_counter()
    if settings.pop("refused", None):
        try:
            make_trainer(directory, name, **settings)
            message = ""
        except ValueError as error:
            message = str(error)
        (directory / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps({"refused": message}))
        return
    resumes = settings.pop("resumes", False)
    trainer = make_trainer(directory, name, **settings)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        pass
    result = {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "grad_norms": [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log],
        "responses": trainer.responses,
        "num_processes": trainer.accelerator.num_processes,
        "engine": type(trainer.model_wrapped).__name__,
        "teacher_held": held(trainer._inner_teacher),
        "student_held": held(trainer.model),
        "teacher_training": any(module.training for module in trainer._inner_teacher.modules()),
        "teacher_gradients": sum(p.grad is not None for p in trainer._inner_teacher.parameters()),
        "devices": sorted({str(p.device) for p in trainer._inner_teacher.parameters()}),
        "seconds": time.perf_counter() - start,
    }
    if mode in ("zero3", "fsdp2") and name.endswith("full-sampled"):
        result["after_error"] = after_error(trainer)
    if mode == "single" or "dataset" in name:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if trainer.accelerator.is_main_process:
            torch.save({key: value.cpu().clone() for key, value in state.items()}, directory / f"{name}.pt")
    if resumes:
        trainer.accelerator.free_memory()
        enter(mode)
        trainer = make_trainer(directory, name, **settings)
        trainer.train(resume_from_checkpoint=str(directory / "runs" / name / "checkpoint-2"))
        result["resumed_losses"] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        result["resumed_responses"] = trainer.responses
    rank = trainer.accelerator.process_index
    (directory / f"{name}-{rank}.json").write_text(json.dumps(result))
    trainer.accelerator.free_memory()


def after_error(trainer: SKDTrainer) -> dict:
    """Whether the student is whole while it samples, and what an error in that time leaves behind."""

    def state() -> list[int]:
        modules = list(trainer.model.modules())
        return [sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules), held(trainer.model)]

    before = state()
    try:
        with student_for_sampling(trainer.model_wrapped, trainer.accelerator, gather=True) as student:
            whole = sum(p.numel() for p in student.parameters() if not isinstance(p, DTensor))
            raise InterruptedError
    except InterruptedError:
        return {"whole": whole, "before": before, "after": state()}


def held(model: torch.nn.Module) -> int:
    """Parameters that this process holds between forwards."""

    def size(parameter):
        if hasattr(parameter, "ds_id"):  # its share, and what is whole just now
            return parameter.ds_tensor.numel() + parameter.numel()
        return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()

    return sum(map(size, model.parameters()))


def enter(mode: str, config: Path | None = None) -> None:
    """The environment that `accelerate launch --config_file <mode>.yaml` (or another `config`) gives its processes."""
    for variable in list(os.environ):
        if variable.startswith(VARIABLES):
            del os.environ[variable]
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    if mode == "single":
        return
    config = config or CONFIGS / f"{mode}.yaml"
    args = launch.launch_command_parser().parse_args(["--config_file", str(config), "script.py"])
    args, defaults, _ = launch._validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = launch_utils.prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = launch_utils.prepare_multi_gpu_env(args)
    os.environ.update({k: v for k, v in environment.items() if k.startswith(VARIABLES)})
    PartialState._prepare_backend = _PREPARE_BACKEND
    if mode == "fsdp2":
        fsdp_on_cpu()


_PREPARE_BACKEND = PartialState._prepare_backend


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["single", "matrix", "resume", "raises", "hangs"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--mode", default="zero3")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(HANGS_AFTER - 60, exit=True)  # says where it hangs
    directory = options.directory
    if options.what == "single":
        whole = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
        for name in ("full", "lora", "tied", "saved_head", "gated", "gated_all", "gated_population", "hybrid"):
            run(directory, f"single-{name}-dataset", **{**matrix()[f"zero3-{name}-dataset"], **whole})
        for which, seed, sizes in (("student", 1, STUDENT), ("teacher", 2, TEACHER)):
            tiny_model(seed=seed, **sizes).save_pretrained(directory / which)
            byte_tokenizer().save_pretrained(directory / which)
        return
    if options.what == "resume":  # started by accelerate itself
        name = f"{options.mode}-killed"
        checkpoint = directory / "runs" / name / "checkpoint-2"
        run(
            directory,
            f"{options.mode}-resumed",
            resume=str(checkpoint),
            **{**RESUMED, "output_dir": str(checkpoint.parent)},
        )
    else:
        without_compiler()
        if options.what == "matrix":
            for name, settings in matrix().items():
                if options.only in name:
                    enter(name.split("-")[0])
                    os.environ.update(settings.pop("environment", {}))
                    run(directory, name, **settings)
                    print(name, flush=True)
        else:
            enter(options.mode)
            settings = {**SAMPLED, "ddp_timeout": 8, "callbacks": [Misbehaves(options.what)]}
            make_trainer(directory, options.what, **settings).train()
    # gloo's threads abort at interpreter exit in about every third run.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
