"""Mixture-of-experts models whose configuration asks for router logits: our own forwards never do, and nothing of it is changed.

Router logits are for the load-balancing loss, which is not added to the divergence, neither on given nor on sampled texts: the
student learns the teacher's distribution. With them a forward on the sampler's cache fails, as that loss is made for a
two-dimensional mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


SETTINGS = ("output_router_logits", "router_aux_loss_coef")


@contextmanager
def without_router_logits(*models: PreTrainedModel) -> Iterator[None]:
    """Inside, the models' forwards make no router logits."""
    with router_settings_kept(*models):
        for config in _configs(models):
            if getattr(config, "output_router_logits", False):
                config.output_router_logits = False
        yield


@contextmanager
def router_settings_kept(*models: PreTrainedModel) -> Iterator[None]:
    """Afterwards the models' configurations say of router logits what they said before: SFTTrainer switches them on."""
    before = [(config, {name: getattr(config, name) for name in SETTINGS if hasattr(config, name)})
              for config in _configs(models)]  # fmt: skip
    try:
        yield
    finally:
        for config, settings in before:
            for name, value in settings.items():
                if getattr(config, name, None) != value:
                    setattr(config, name, value)


def _configs(models):
    return [config for model in models for config in (model.config, model.config.get_text_config())]


def describe_left_out_loss(student: PreTrainedModel, coefficient: float | None) -> str | None:
    """What to say of a load-balancing loss that SFTTrainer would add, with the `coefficient` of the arguments or, where that is `None`,
    of the student's configuration; `None` if it would add none."""
    own = getattr(student.config.get_text_config(), "router_aux_loss_coef", None)
    if not own or coefficient == 0:
        return None
    return (
        f"The student is a mixture of experts whose configuration names a load-balancing loss (router_aux_loss_coef={own}). SFTTrainer "
        "adds it; here, as in GKDTrainer, the divergence is the whole loss. Set router_aux_loss_coef=0.0 to say that you know."
    )
