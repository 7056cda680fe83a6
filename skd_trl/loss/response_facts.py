"""What is known of the response tokens besides the two models' distributions: what a gate may look at.

One frozen record of N positions, row by row of the batch, made once per micro-batch. Every field always has a value, so
a gate never asks whether it is there. Shapes: N positions, U uniforms per position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class ResponseFacts:
    """
    Facts about N response tokens. [`ResponseFacts.of`] fills in what is not given.

    Attributes:
        labels (`Tensor` `(N,)`, long):
            The tokens.
        position (`Tensor` `(N,)`, long):
            Each token's place in its response, from 0.
        is_end (`Tensor` `(N,)`, bool):
            Whether the token is an end of sequence.
        replaced (`Tensor` `(N,)`, bool):
            Whether the token is the teacher's in place of a rejected proposal. `False` in given responses.
        teacher_rank (`Tensor` `(N,)`, long):
            How many tokens the teacher ranked above the student's proposal; -1 where no proposal was judged.
        uniforms (`Tensor` `(N, U)`):
            The gate's noise, from U[0, 1). U may be 0.

    Raises:
        `ValueError`: fields of different lengths.
    """

    labels: Tensor
    position: Tensor
    is_end: Tensor
    replaced: Tensor
    teacher_rank: Tensor
    uniforms: Tensor

    def __post_init__(self):
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Rows per field are {lengths}, but each row is one position; select the same positions.")

    @classmethod
    def of(
        cls,
        labels: Tensor,
        *,
        position: Tensor | None = None,
        is_end: Tensor | None = None,
        replaced: Tensor | None = None,
        teacher_rank: Tensor | None = None,
        uniforms: Tensor | None = None,
    ) -> "ResponseFacts":
        """Facts about `labels` `(N,)`. By default they are one response from its first token, nothing ends it, nothing
        was replaced or judged, and there is no noise."""
        false = torch.zeros_like(labels, dtype=torch.bool)
        return cls(
            labels=labels,
            position=torch.arange(len(labels), device=labels.device) if position is None else position,
            is_end=false if is_end is None else is_end,
            replaced=false if replaced is None else replaced,
            teacher_rank=torch.full_like(labels, -1) if teacher_rank is None else teacher_rank,
            uniforms=torch.empty((len(labels), 0), device=labels.device) if uniforms is None else uniforms,
        )

    @classmethod
    def cat(cls, facts: Sequence["ResponseFacts"]) -> "ResponseFacts":
        """The facts about several micro-batches, in their order."""
        return cls(**{field.name: torch.cat([getattr(one, field.name) for one in facts]) for field in fields(cls)})

    def __len__(self) -> int:
        return len(self.labels)

    def check_one_each(self, what: str, values: Tensor) -> None:
        """Raises `ValueError`, naming `what` they are of, unless `values` are one number for each position, `(N,)`."""
        if values.shape != self.labels.shape:
            raise ValueError(
                f"The {what} gives {tuple(values.shape)} for {len(self)} positions; it has to give one number for each, (N,)."
            )

    def __getitem__(self, rows: slice) -> "ResponseFacts":
        return ResponseFacts(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})
