"""How the package is cut: its public names, which module may know which, and where TRL's moving parts are."""

import ast
import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import skd_trl
from skd_trl import interleaved_sample
from skd_trl.loss.distillation_loss import distillation_loss, gate_weights


PACKAGE = Path(skd_trl.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))

# What each folder may know of the package. Everything else is glue: trainers, configurations, the command line.
WALLS = {"sampling": {"sampling"}, "loss": {"loss"}, "data": {"data"}, "serving": {"serving", "sampling"},
         "training": {"training", "sampling", "loss", "data", "serving", "_compat", "skd_config", "inherited_options"}}  # fmt: skip
ENGINES_AND_TRAINERS = {"trl", "accelerate", "deepspeed"}


def imports_of(module):
    """The package's own modules, as paths, and others by their dotted names, that a module imports when it runs."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    own, others = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            folder = module.split("/")[: -node.level]
            own.add("/".join([*folder, *(node.module or "__init__").split(".")]))
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module)
        elif isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
    return own, others


def test_the_public_names_are_these():
    assert sorted(skd_trl.__all__) == [
        "ACCEPTANCE_RULES",
        "AcceptanceRule",
        "AutoDraftLength",
        "DIVERGENCES",
        "Divergence",
        "Draft",
        "Execution",
        "GATES",
        "Gate",
        "Judgement",
        "LocalParticipant",
        "Participant",
        "Prompts",
        "ResponseFacts",
        "Rollout",
        "Rounds",
        "SKDConfig",
        "SKDTrainer",
        "SamplingParams",
        "Schedule",
        "SpecKDConfig",
        "SpecKDTrainer",
        "interleaved_sample",
    ]
    assert all(hasattr(skd_trl, name) for name in skd_trl.__all__)
    assert skd_trl._MODULES.keys() == set(skd_trl.__all__) <= set(dir(skd_trl))


def test_modules_are_attributes_of_the_package_and_other_names_are_none():
    code = "import skd_trl; skd_trl.loss.divergences.DIVERGENCES; skd_trl.schedules.Schedule; assert not hasattr(skd_trl, 'SKDTrianer')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_is_there_before_torch_and_trl_are():
    code = "import sys; from skd_trl.__main__ import main; main([]); assert not {'torch', 'trl', 'transformers'} & sys.modules.keys()"
    assert (
        "distil a teacher"
        in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.parametrize("module", [module for module in MODULES if module.split("/")[0] in WALLS])
def test_the_walls_hold(module):
    folder, (own, others) = module.split("/")[0], imports_of(module)
    assert {name.split("/")[0] for name in own} <= WALLS[folder]
    assert folder == "training" or not {name.split(".")[0] for name in others} & ENGINES_AND_TRAINERS


@pytest.mark.parametrize("function", [interleaved_sample, distillation_loss, gate_weights])
def test_the_functions_at_the_borders_have_fewer_than_ten_parameters(function):
    assert len(inspect.signature(function).parameters) < 10


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"_compat"}))
def test_only_compat_imports_from_trl(module):
    assert not any(name.split(".")[0] == "trl" for name in imports_of(module)[1])


def fields_of(config_class):
    missing = dataclasses.MISSING
    return {f.name: None if f.default is missing else repr(f.default) for f in dataclasses.fields(config_class)}


def test_where_gkd_is_gone_a_config_with_its_fields_and_a_trainer_on_sft_take_its_place():
    gkd = pytest.importorskip("trl.experimental.gkd")
    script = (
        "import without_gkd, json; from skd_trl import SKDTrainer; from test_package import fields_of; "
        "from skd_trl._compat import GKDConfig; "
        "names = [c.__module__ + '.' + c.__name__ for c in SKDTrainer.__mro__ if not c.__module__.startswith('skd_trl.training')]; "
        "print(json.dumps([fields_of(GKDConfig), names[1:3]]))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(PACKAGE.parent)])
    process = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    fields, parents = json.loads(process.stdout.splitlines()[-1])
    assert fields == fields_of(gkd.GKDConfig)
    assert parents == ["skd_trl._compat.GKDTrainer", "trl.trainer.sft_trainer.SFTTrainer"]
