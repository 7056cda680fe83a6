"""How the package is cut: its public names, which module may know which, and where TRL's moving parts are."""

import ast
from pathlib import Path

import pytest

import skd_trl


PACKAGE = Path(skd_trl.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

# Each layer may import from itself and from those above it.
LAYERS = [
    {"sampling_params", "divergences", "token_distributions", "token_statistics"},  # torch alone
    {
        "acceptance",
        "gates",
        "lm_head",
        "ragged_cache",
        "boundary",
        "chunks",
        "collator",
        "vocabulary",
        "draft_length",
        "prefill",
        "sampler_inputs",
    },
    {"compiled_step", "head_gradients", "losses", "rollout", "sampler", "hidden_states", "response_tokens"},
    {"_compat"},
    {"tokenization", "data", "distributed", "completions", "metrics"},
    {"inherited_options", "skd_config", "speckd_config"},
    {"models", "preparation", "draft_length_state"},
    {"skd_trainer", "speckd_trainer"},
]


def imports_of(module):
    """Names of the package's own modules, and of others by their dotted names, that a module imports when it runs."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    own, others = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            own |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module)
        elif isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
    return own, others


def test_the_public_names_are_these():
    assert sorted(skd_trl.__all__) == [
        "ACCEPTANCE_RULES",
        "DIVERGENCES",
        "GATES",
        "Rollout",
        "SKDConfig",
        "SKDTrainer",
        "SamplingParams",
        "SpecKDConfig",
        "SpecKDTrainer",
        "interleaved_sample",
    ]
    assert all(hasattr(skd_trl, name) for name in skd_trl.__all__)


def test_every_module_has_its_layer():
    assert set(MODULES) == set().union(*LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_from_their_own_layer_and_those_above(module):
    level = next(i for i, layer in enumerate(LAYERS) if module in layer)
    assert imports_of(module)[0] <= set().union(*LAYERS[: level + 1])


@pytest.mark.parametrize("module", sorted(set().union(*LAYERS[:3])))
def test_what_samples_and_what_weighs_knows_neither_trl_nor_a_trainer(module):
    others = imports_of(module)[1]
    assert not any(name.split(".")[0] in ("trl", "accelerate", "deepspeed") for name in others)
    assert not any("trainer" in name for name in others)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"_compat"}))
def test_only_compat_imports_from_trl(module):
    assert not any(name.split(".")[0] == "trl" for name in imports_of(module)[1])
