"""How the package is cut: its public names, which module may know which, and where TRL's moving parts are."""

import ast
from pathlib import Path

import pytest

import skd_trl


PACKAGE = Path(skd_trl.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))

# What the modules of each folder, and on top of all of them the trainers and configurations, may know of the package.
WALLS = {
    "sampling": {"sampling"},
    "loss": {"loss"},
    "data": {"data", "_compat"},
    "training": {"training", "sampling", "loss", "data", "_compat", "skd_config"},
}


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
        "DIVERGENCES",
        "Divergence",
        "Draft",
        "GATES",
        "Gate",
        "ResponseFacts",
        "Rollout",
        "SKDConfig",
        "SKDTrainer",
        "SamplingParams",
        "Schedule",
        "SpecKDConfig",
        "SpecKDTrainer",
        "interleaved_sample",
    ]
    assert all(hasattr(skd_trl, name) for name in skd_trl.__all__)


@pytest.mark.parametrize("module", [module for module in MODULES if module.split("/")[0] in WALLS])
def test_a_folder_knows_what_its_walls_let_it_know(module):
    assert {name.split("/")[0] for name in imports_of(module)[0]} <= WALLS[module.split("/")[0]]


@pytest.mark.parametrize(
    "module", [module for module in MODULES if module.split("/")[0] in ("sampling", "loss", "data")]
)
def test_what_samples_what_weighs_and_what_reads_know_neither_trl_nor_a_trainer(module):
    others = imports_of(module)[1]
    assert not any(name.split(".")[0] in ("trl", "accelerate", "deepspeed") for name in others)
    assert not any("trainer" in name for name in others)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"_compat"}))
def test_only_compat_imports_from_trl(module):
    assert not any(name.split(".")[0] == "trl" for name in imports_of(module)[1])
