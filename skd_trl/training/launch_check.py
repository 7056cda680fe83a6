"""Whether what a launcher has set up can train the pair: the engine, what the student trains, in which precision, and whether that is fast."""

from accelerate import Accelerator
from transformers import PreTrainedModel

from ..loss.lm_head import LMHead
from ..skd_config import SKDConfig
from .distributed import check_connected, check_engine, check_head, check_tying
from .engine_settings import check_processes, check_settings
from .findings import Finding, Verdict, finding_of
from .precision import casts_of_teacher, lost_updates, slower_in_16_bits
from .trained_parameters import reached_parameters


def check_launch(
    student: PreTrainedModel, teacher: PreTrainedModel, args: SKDConfig, accelerator: Accelerator
) -> list[Finding]:
    """Whether the engine that was launched can train the pair, and what it trains, in which precision. `student` has its adapter by
    then."""
    return [
        finding_of("engine", _check_engine, student, teacher, args, accelerator),
        finding_of("trained parameters", reached_parameters, student),
        finding_of("precision", lost_updates, student, accelerator),
        finding_of("teacher's precision", casts_of_teacher, student, teacher, accelerator),
        finding_of("speed", slower_in_16_bits, accelerator),
    ]


def _check_engine(
    student: PreTrainedModel, teacher: PreTrainedModel, args: SKDConfig, accelerator: Accelerator
) -> tuple[Verdict, str]:
    check_connected(accelerator)
    check_processes(args)
    check_engine(accelerator, args.shard_teacher, args.compile_student)
    check_settings(args, accelerator, student, teacher)
    for name, model in (("student", student), ("teacher", teacher)):
        check_head(LMHead.of(model), name, accelerator)
    check_tying(student, accelerator)
    kind = getattr(accelerator.distributed_type, "value", accelerator.distributed_type)
    engine = "without an engine that shards" if kind in ("NO", "MULTI_CPU", "MULTI_GPU") else f"under {kind}"
    return Verdict.GOOD, f"{accelerator.num_processes} process(es) {engine}."
