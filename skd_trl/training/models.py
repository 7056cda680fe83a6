"""Student, tokenizer and arguments from whatever the caller gives: objects, names or paths. None of the objects changes."""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file, is_peft_available

from .._compat import create_model_from_path, get_config_model_id
from ..sampling.ragged_cache import eval_mode
from .distributed import is_sharded


if TYPE_CHECKING:
    from peft import PeftConfig

    from ..skd_config import SKDConfig


logger = get_logger(__name__)


def given_model(name: str, model: Any) -> Any:
    """What was given as `name`: a model, its name or path, or nothing.

    Raises:
        `TypeError`: for anything else.
    """
    if isinstance(model, os.PathLike):
        return os.fspath(model)
    if model is not None and not isinstance(model, (str, nn.Module)):
        raise TypeError(
            f"{name} is of type {type(model).__name__}, which is no model to run. Give one causal language model, or its name or path"
            f"{' (several teachers are a dict of their names)' if isinstance(model, (list, tuple)) else ''}."
        )
    return model


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model, which an adapter may be around."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def load_tokenizer(model, processing_class, args: "SKDConfig") -> PreTrainedTokenizerBase:
    if processing_class is None:
        if isinstance(model, str):
            name, revision = model, (args.model_init_kwargs or {}).get("revision")
            adapter = _adapter_at(model, args)
            # An adapter may be saved without a tokenizer, then its base model's is meant.
            if adapter is not None and Path(model).is_dir() and not (Path(model) / "tokenizer_config.json").exists():
                name = _base_of(adapter, model)
        else:
            name, revision = get_config_model_id(model.config), None
        if not name:
            raise ValueError(
                "processing_class is None and the model does not say where it was loaded from. Pass the tokenizer."
            )
        processing_class = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=args.trust_remote_code
        )
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class is of type {type(processing_class).__name__}; only texts are supported, so pass a tokenizer (of a "
            "processor: processor.tokenizer)."
        )
    return processing_class


def with_options(tokenizer: PreTrainedTokenizerBase, args: "SKDConfig") -> PreTrainedTokenizerBase:
    """The tokenizer with `eos_token`, `pad_token` and `chat_template_path` of `args`, before anything is read from it; a copy
    where it changes. (SFTTrainer applies them later, when the rows here are already tokens.)

    Raises:
        `ValueError`: for a token that the tokenizer lacks, or a template that is not a file.
    """
    tokens = {name: getattr(args, name, None) for name in ("eos_token", "pad_token")}
    if not any(tokens.values()) and args.chat_template_path is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    for name, token in tokens.items():
        if token is not None and token not in tokenizer.get_vocab():
            raise ValueError(f"{name}={token!r} is not in the tokenizer's vocabulary; give one of its tokens.")
        if token is not None:
            setattr(tokenizer, name, token)
    if args.chat_template_path is not None:
        path = Path(args.chat_template_path)
        if not path.is_file() or path.suffix not in (".jinja", ".j2"):
            raise ValueError(
                f"chat_template_path={args.chat_template_path!r} is not a .jinja file. Of a model TRL would also take the special "
                "tokens into the student's vocabulary, where the teacher does not know them; save that model's template to a "
                ".jinja file, or set `tokenizer.chat_template`."
            )
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """What fills padding: an id below `vocab_size`, which both models have (a padding token that was added to the tokenizer may
    not be). Masks say what is padding, so an end-of-sequence id, or any other, serves as well."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None and 0 <= i < vocab_size)


def disable_dropout(model: nn.Module) -> None:
    """Dropout off, except an adapter's own, which the user asked for in its configuration. Most of transformers' decoders have no module
    for it, but a number (`self.attention_dropout`); some read it from their config, which says so in a warning."""
    for module in _modules_without_adapters(model):
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)
    base = base_model(model)
    left = {name: value for name, value in vars(base.config.get_text_config()).items() if "drop" in name and value}
    if left and not is_sharded(model) and _is_random(model, base.device):
        found = ", ".join(f"{name}={value}" for name, value in left.items())
        logger.warning(
            f"disable_dropout=True, but {type(base).__name__} reads its dropout from its config in each forward ({found}), so it stays on "
            f"and the loss is noisy. Load the model without: from_pretrained(..., {', '.join(f'{name}=0.0' for name in left)})."
        )


def copy_around(model: nn.Module, copies: dict[int, Any]) -> nn.Module:
    """A deep copy of a model in which `copies` take the places of the objects with these ids. Tensors that a layer keeps and that are
    results of others (peft keeps views of a tied adapter) cannot be copied and are shared."""
    kept = [value for module in model.modules() for value in tree_leaves(vars(module))]
    results = {id(value): value for value in kept if isinstance(value, torch.Tensor) and not value.is_leaf}
    return copy.deepcopy(model, {**results, **copies})


@torch.no_grad()
def _is_random(model: nn.Module, device: torch.device) -> bool:
    """Whether two forwards in training mode differ, with adapters as in evaluation."""
    input_ids = torch.arange(1, 17, device=device)[None]
    with eval_mode(model):
        for module in (own := list(_modules_without_adapters(model))):
            module.training = True
        first, second = (model(input_ids=input_ids, use_cache=False).logits for _ in range(2))
        for module in own:
            module.training = False
    return not torch.equal(first, second)


def _modules_without_adapters(module: nn.Module) -> Iterator[nn.Module]:
    """All modules in this one but what adapters added."""
    is_adapter = hasattr(module, "base_layer") and hasattr(module, "active_adapters")
    if not is_adapter:
        yield module
    for child in [module.base_layer] if is_adapter else module.children():
        yield from _modules_without_adapters(child)


def copied_arguments(
    args: "SKDConfig | None", config_class: "type[SKDConfig]", suffix: str, model: nn.Module | str
) -> "SKDConfig":
    """A copy of `args` that the trainer may change, the caller's stays as it was; the defaults if there are none.

    Raises:
        `TypeError`: if `args` has no fields for sampling, or has those of another trainer, which would do nothing here.
    """
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = config_class(f"{name.split('/')[-1] or 'student'}{suffix}")
    if not isinstance(args, config_class):
        raise TypeError(
            f"args is of type {type(args).__name__}; this trainer needs a {config_class.__name__} (the other lacks fields). "
            "Construct one with the same values."
        )
    nearest = next(
        c for c in type(args).__mro__ if c.__module__.split(".")[0] == config_class.__module__.split(".")[0]
    )
    if nearest is not config_class and config_class in nearest.__mro__:
        raise TypeError(
            f"args is a {nearest.__name__}, whose own settings this trainer does not know: it would train as if they were not "
            f"there. Use {nearest.__name__.removesuffix('Config')}Trainer, or construct a {config_class.__name__}."
        )
    args = copy.copy(args)
    for name in ("dataset_kwargs", "model_init_kwargs", "gradient_checkpointing_kwargs", "accelerator_config"):
        setattr(args, name, copy.deepcopy(getattr(args, name)))
    args.remove_unused_columns = False
    if args.teacher_device is not None and args.n_gpu > 1:
        args._n_gpu = 1  # the others are not for copies of the student (nn.DataParallel)
    args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    # Each rank collates its own rows, of streams too: batches of different widths could not be concatenated and sent around.
    args.accelerator_config.dispatch_batches = False
    return args


def load_student(name: str, args: "SKDConfig") -> PreTrainedModel:
    kwargs = dict(args.model_init_kwargs or {})
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    # Each process holds its own, on one device; TRL's default in a single process is to spread it over all.
    kwargs.setdefault("device_map", None)
    # The Trainer is given an object, and would warn that these no longer have an effect.
    adapter, args.model_init_kwargs = _adapter_at(name, args), None
    if adapter is None:
        return create_model_from_path(name, **kwargs)
    from peft import PeftModel

    revision = kwargs.pop("revision", None)  # of what was named: the adapter
    base = create_model_from_path(_base_of(adapter, name), **kwargs, revision=adapter.revision or "main")
    return PeftModel.from_pretrained(base, name, is_trainable=True, revision=revision)  # type: ignore[return-value]


def _adapter_at(name: str, args: "SKDConfig") -> "PeftConfig | None":
    """The configuration of the adapter that is saved under `name`, if it is one."""
    revision = (args.model_init_kwargs or {}).get("revision")
    if not is_peft_available() or find_adapter_config_file(name, revision=revision) is None:
        return None
    from peft import PeftConfig

    return PeftConfig.from_pretrained(name, revision=revision)


def _base_of(adapter: "PeftConfig", name: str) -> str:
    if not adapter.base_model_name_or_path:
        raise ValueError(
            f"{name!r} is an adapter that does not say which model it belongs to (base_model_name_or_path). Load that model and "
            "give PeftModel.from_pretrained(model, path, is_trainable=True) as the student."
        )
    return adapter.base_model_name_or_path
