"""Gradients computed along with a loss: summed over chunks of positions, then attached to it for `backward` to hand out.

The loss knows the gradient of each chunk's raw logits while they are in memory; what it becomes for the hidden states and
the head is one matrix product each, done at once, so nothing is recomputed and no logits are kept.

Shapes: N positions, V vocabulary, H hidden.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lm_head import LMHead


class HeadGradients:
    """Sums the gradients of the student's hidden states and trainable head tensors over chunks."""

    def __init__(self, hidden: Tensor, head: LMHead, prepared: LMHead, skip_zeros: bool):
        self.head, self.prepared, self.skip_zeros = head, prepared, skip_zeros
        self.hidden = torch.zeros_like(hidden) if hidden.requires_grad else None
        self.trained = {id(parameter) for parameter in head.trainable_parameters()}
        self.sums: dict[int, Tensor] = {}  # by the same ids, made when first needed

    @torch.no_grad()  # a graph of these products would keep every chunk's gradient, (N, V) in all, until the backward
    def add(self, rows: slice, hidden: Tensor, raw: Tensor, raw_gradient: Tensor, weight: Tensor) -> None:
        """Takes raw logits (with their graph where the head is a module) and the loss's gradient to them. Positions of
        `weight` 0 have none: with `skip_zeros`, and where they are many enough to pay for a copy of the others, the products
        leave them out."""
        if self.head.module is not None:
            parameters = self.head.trainable_parameters()
            hidden_gradient, *gradients = torch.autograd.grad(
                raw, [hidden, *parameters], raw_gradient, allow_unused=True
            )
            if self.hidden is not None:
                self.hidden[rows] = hidden_gradient
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    self._sum_of(parameter).add_(gradient)
            return
        matrix, bias = self.prepared.weight, self.head.bias
        assert matrix is not None and self.head.weight is not None
        where: slice | Tensor = rows
        if self.skip_zeros:
            weighed = weight.nonzero().squeeze(-1)
            if 4 * len(weighed) <= 3 * len(weight):
                where, hidden, raw_gradient = rows.start + weighed, hidden[weighed], raw_gradient[weighed]
        if self.hidden is not None:
            self.hidden[where] = (raw_gradient @ matrix).to(self.hidden.dtype)
        whole = self.head.weight
        if id(whole) in self.trained:
            # A head is the largest tensor there is: each pass over it that can be saved is saved. Rows beyond V have no gradient.
            left, right = raw_gradient.T, hidden.to(raw_gradient.dtype)
            if id(whole) not in self.sums and len(left) == len(whole):
                self.sums[id(whole)] = (left @ right).to(_sum_type(whole))
            elif left.dtype == _sum_type(whole):
                self._sum_of(whole)[: len(left)].addmm_(left, right)
            else:
                # Each product in the model's type, at its speed; only the sum over chunks needs more digits.
                self._sum_of(whole)[: len(left)] += left @ right
        if bias is not None and id(bias) in self.trained:
            sum_ = self._sum_of(bias)
            sum_[: len(matrix)] += raw_gradient.sum(0, dtype=sum_.dtype)

    def _sum_of(self, parameter: Tensor) -> Tensor:
        if id(parameter) not in self.sums:
            self.sums[id(parameter)] = torch.zeros_like(parameter, dtype=_sum_type(parameter))
        return self.sums[id(parameter)]

    def sums_for(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sums, in the order and types of `tensors` (the hidden states and parameters they belong to)."""
        sums = [self._sum_of(tensor) if id(tensor) in self.trained else self.hidden for tensor in tensors]
        return [sum_.to(tensor.dtype) for sum_, tensor in zip(sums, tensors, strict=True)]


class AttachGradients(torch.autograd.Function):
    """Gives a loss the gradients that were computed along with it. They are scaled where they lie, so `backward` works
    once, like that of any graph that is not retained."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient: Tensor):
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradients of this loss were handed out by an earlier backward, and are not kept: call backward once, "
                "on a sum of losses if need be, or compute the loss again."
            )
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(gradient.mul_(loss_gradient) for gradient in gradients)


def _sum_type(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
