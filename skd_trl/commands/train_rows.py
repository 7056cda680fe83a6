"""The rows of `skd train`: those to train on, and those held out to compare the student before and after."""

from accelerate import PartialState
from datasets import Dataset, IterableDataset

from ..data.dataset import columns_of
from ..skd_config import SKDConfig
from .rows import hold_out, load_rows, split_names
from .train_options import TrainArguments


def load_train_and_test(
    args: TrainArguments, training_args: SKDConfig
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """The rows to train on and those held out, if any are; decides whether the student is compared, where nothing was given."""
    seed = training_args.seed

    def load(split: str, num_rows: int, streaming: bool = False):
        rows = load_rows(
            args.dataset_name, split, config=args.dataset_config, num_rows=num_rows, seed=seed, streaming=streaming
        )
        return args.fill(rows)

    train_rows = load(args.dataset_train_split, args.num_train_rows, args.dataset_streaming)
    decide_comparison(args, training_args, train_rows)
    if args.compare_at_evaluation and (not args.compare or training_args.eval_strategy == "no"):
        needed = "eval_strategy steps or epoch" if args.compare else "a comparison (compare)"
        raise ValueError(f"compare_at_evaluation=True has no effect without {needed}: set it, or leave this out.")
    if not args.compare and training_args.eval_strategy == "no":
        return train_rows, None
    if args.dataset_test_split in split_names(args.dataset_name, args.dataset_config):
        return train_rows, load(args.dataset_test_split, args.num_eval_rows)
    if isinstance(train_rows, IterableDataset):
        raise ValueError(
            f"{args.dataset_name} has no split {args.dataset_test_split!r}, and no rows can be held out of a stream. Name one with "
            "--dataset_test_split, or give --compare false and --eval_strategy no."
        )
    train_rows, test_rows = hold_out(train_rows, args.num_eval_rows, seed)
    if PartialState().is_main_process:
        print(
            f"{args.dataset_name} has no split {args.dataset_test_split!r}: {len(test_rows)} of its {args.dataset_train_split} rows "
            f"are held out, {len(train_rows)} are left to train on."
        )
    return train_rows, test_rows


def decide_comparison(
    script_args: TrainArguments, training_args: SKDConfig, train_rows: Dataset | IterableDataset
) -> None:
    """Sets `compare` where nothing was given, and says why if there is no one teacher to compare with."""
    if script_args.compare is not None:
        return
    own_prompts = {"teacher_prompt", "privileged_context"} & set(columns_of(train_rows))
    if training_args.teacher_model_kind is not None:
        reason = "the teacher is the student itself"
    elif training_args.teacher_model_name_or_path is None:
        reason = "there is no single teacher in this process"
    elif own_prompts:
        reason = f"the teacher reads prompts that differ from the student's ({own_prompts.pop()})"
    else:
        reason = None
    script_args.compare = reason is None
    if reason and PartialState().is_main_process:
        print(f"The student is not compared before and after: {reason}. See skd compare.")
