"""Fields of the configurations that say who the teacher is and what it reads; their checks, which need no model.

Names that TRL's SDFT has are those of SDFT, with their meaning and defaults.
"""

from dataclasses import dataclass, field

from .data.teacher_prompts import DEFAULT_TEMPLATE, check_template


@dataclass
class TeacherOptions:
    """
    What [`SKDConfig`] says of the teacher.

    Args:
        teacher_prompt_template (`str`, *optional*, defaults to `"{prompt}\\n\\n{privileged_context}"`):
            How the teacher's prompt is made of rows with a `privileged_context`: the text of the last user turn and the context.
        max_teacher_prompt_length (`int`, *optional*):
            Rows whose `teacher_prompt`, or prompt with context, is longer are left out. By default what the teacher's positions
            leave beside the response.
    """

    teacher_prompt_template: str = field(
        default=DEFAULT_TEMPLATE,
        metadata={
            "help": "How the teacher's prompt is made of rows with a `privileged_context` column: {prompt} is the text of the last "
            "user turn, {privileged_context} what only the teacher reads."
        },
    )
    max_teacher_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Rows whose prompt of the teacher's own is longer are left out. Default: what its positions leave beside the "
            "response."
        },
    )

    def check_teacher(self) -> None:
        """
        Raises:
            `ValueError`: for values that cannot work.
        """
        check_template(self.teacher_prompt_template)
        if self.max_teacher_prompt_length is not None and self.max_teacher_prompt_length < 1:
            raise ValueError(f"max_teacher_prompt_length={self.max_teacher_prompt_length} must be at least 1.")
