"""Rows grouped by length, in an order that a resumed run has too."""

from transformers.trainer_pt_utils import LengthGroupedSampler

from .distributed import keyed_generator


class KeyedLengthSampler(LengthGroupedSampler):
    """transformers' sampler, which draws its order from the global generator, with one that is keyed by seed and epoch.

    Args:
        sampler ([`~transformers.trainer_pt_utils.LengthGroupedSampler`]): whose lengths and batch size are taken.
        seed (`int`): of the order.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int):
        super().__init__(sampler.batch_size, lengths=sampler.lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.generator = keyed_generator("lengths", self.seed, epoch)
