"""The only file that imports from `trl.experimental` and from TRL's helpers: what may move between TRL releases.

Tested with the oldest and the newest release that setup.cfg admits. `GKDTrainer` lives in `trl.experimental.gkd`, whose
contents may change in any release without notice.
"""

import os
import warnings

from trl import SFTTrainer


with warnings.catch_warnings():
    # TRLExperimentalWarning: that this package builds on an experimental module is for us to keep up with.
    warnings.filterwarnings("ignore", message=".*experimental.*")
    silenced = os.environ.get("TRL_EXPERIMENTAL_SILENCE")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    try:
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    finally:
        if silenced is None:
            del os.environ["TRL_EXPERIMENTAL_SILENCE"]
        else:
            os.environ["TRL_EXPERIMENTAL_SILENCE"] = silenced

from trl.models.utils import add_hooks, remove_hooks
from trl.trainer.utils import create_model_from_path, get_config_model_id


__all__ = [
    "GKDConfig",
    "GKDTrainer",
    "SFTTrainer",
    "add_hooks",
    "create_model_from_path",
    "get_config_model_id",
    "remove_hooks",
]
