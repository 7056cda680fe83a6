"""What interleaved sampling has written.

Shapes: B prompts, S tokens of prompt and response, T response (at most `max_new_tokens`), H hidden.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rollout:
    """Sampled responses, laid out as a training batch: in each row the prompt, the response, padding.

    Attributes:
        input_ids, attention_mask, labels (`torch.LongTensor` of shape `(B, S)`):
            S is the longest row. `labels` is -100 on prompts and padding. Padding is filled with an end-of-sequence id.
        replaced (`torch.BoolTensor` of shape `(B, T)`):
            Where the teacher's token replaced the student's proposal; counted, as the next two, from the first token of
            the response. T is the longest response. False on padding.
        proposals (`torch.LongTensor` of shape `(B, T)`):
            The student's proposal at each position; -100 on padding, and where nothing was drafted (rule `never`).
        teacher_rank (`torch.LongTensor` of shape `(B, T)`):
            How many ids the teacher ranks higher than the proposal (0: its favourite); -1 on padding, and where nothing was
            drafted or judged.
        teacher_signal (`dict` of `torch.Tensor` of shape `(B, T, ...)`):
            What the teacher's forwards left for the loss, by name; 0 on padding. A local teacher leaves
            `teacher_hidden_states` (B, T, H), which predict each response token. Empty if the teacher did not run (rule `always`).
        num_rounds (`int`): rounds that kept a token or more, summed over rows. `num_drafted` (`int`): tokens drafted, the dropped ones included.
        num_truncated (`int`): rows cut at `max_new_tokens` before an end-of-sequence token.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    replaced: torch.Tensor
    proposals: torch.Tensor
    teacher_rank: torch.Tensor
    teacher_signal: dict[str, torch.Tensor]
    num_rounds: int
    num_drafted: int
    num_truncated: int

    @property
    def teacher_hidden_states(self) -> torch.Tensor | None:
        """(B, T, H), or `None` if the teacher left none."""
        return self.teacher_signal.get("teacher_hidden_states")

    @property
    def num_tokens(self) -> int:
        """Response tokens of all rows; each is either accepted or replaced."""
        return int((self.labels != -100).sum())

    @property
    def num_replaced(self) -> int:
        return int(self.replaced.sum())

    @property
    def num_accepted(self) -> int:
        return self.num_tokens - self.num_replaced
