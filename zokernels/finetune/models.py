"""Models and tokenizers, and which of a model's parameters move."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zokernels.finetune.config import Config, UserError, _one_line
from zokernels.finetune.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEYWORDS = (
    "full, lora, norms, biases, layers:SLICE, regex:PATTERN, joined by + (union) and & (both)"
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and notes."""
    from transformers.utils import logging as logging_

    logging: Any = logging_
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def device_of(config: Config, ranks: Ranks = ALONE) -> torch.device:
    """The device of a run; of several ranks on CUDA each has the GPU of its number on its machine.

    Raises:
        UserError: torch does not know the device, or it is not there, or not one for every rank.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device must be auto, cpu or cuda[:N]; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda[:N]; got {name!r}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device {config.device}: torch sees {count} CUDA devices")
    if device.type == "cuda" and ranks.count > 1:
        if device.index is not None:
            raise UserError(
                f"--device {name} is one GPU for {ranks.count} ranks: with auto or cuda each takes "
                f"one of its own"
            )
        if ranks.local_count > count:
            raise UserError(
                f"{ranks.local_count} ranks were started on a machine where torch sees {count} "
                f"CUDA devices, and each needs one of its own: torchrun --nproc-per-node {count}, "
                f"or --device cpu"
            )
        return torch.device("cuda", ranks.local)
    return device


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        UserError: there is none at ``name``.
    """
    from transformers import AutoTokenizer

    _check_path(name)
    with quiet():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"--model {name}: no tokenizer: {_one_line(error)}") from error
    return tokenizer


def load_model(config: Config, seed: int, device: torch.device | None = None) -> nn.Module:
    """The model in evaluation mode, with ``requires_grad`` on the parameters that move.

    New adapter weights (LoRA) are drawn from ``seed``. ``device`` is the configuration's unless it
    is given.

    Raises:
        UserError: it cannot be loaded, is no causal language model, or nothing is selected.
    """
    from transformers import AutoModelForCausalLM

    _check_path(config.model)
    dtype = getattr(torch, config.dtype)
    with quiet():
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(
                f"--model {config.model} cannot be loaded: {_one_line(error)}"
            ) from error
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.max_length > limit:
        raise UserError(
            f"--max-length must be at most the model's {limit}; got {config.max_length}"
        )
    model.to(device or device_of(config))
    model.requires_grad_(False)
    if config.trainable == "lora":
        model = add_lora(model, config, seed)
    else:
        names = select(model, config.trainable)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
    loaded: nn.Module = model
    return loaded.eval()


def _check_path(name: str) -> None:
    """A clear word for a path that is not there, before a hub is asked for it."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not Path(name).expanduser().exists():
        raise UserError(f"--model: no such folder: {name}")


def add_lora(model: nn.Module, config: Config, seed: int) -> nn.Module:
    """The model with LoRA adapters, which alone move.

    Raises:
        UserError: peft is missing, or finds no layer to adapt.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("--trainable lora needs: pip install peft") from error
    options = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=list(config.lora_targets) or None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapted: nn.Module = get_peft_model(model, options)
        except ValueError as error:
            raise UserError(f"--trainable lora: {_one_line(error)}") from error
    return adapted


def select(model: nn.Module, selection: str) -> set[str]:
    """Names of the parameters a selection stands for.

    ``full``; ``norms`` (every parameter of a normalisation); ``biases``; ``layers:SLICE``
    (blocks of the model's largest stack by Python slice or comma-separated indices:
    ``layers:-4:``, ``layers:0,5``); ``regex:PATTERN`` (searched in the qualified name; at the start
    it takes the whole text). ``a+b`` is the union and ``a&b`` the intersection, which binds
    stronger: ``layers:-6:&norms``.

    Raises:
        UserError: a malformed selection, or one that selects nothing.
    """
    # Quantised bases hold integers, which stay as they are.
    names = {name for name, p in model.named_parameters() if p.is_floating_point()}
    if selection.startswith("regex:"):
        chosen = _matching(names, selection.removeprefix("regex:"))
    else:
        chosen = set()
        for alternative in selection.split("+"):
            parts = [_simple(model, names, part.strip()) for part in alternative.split("&")]
            chosen |= set.intersection(*parts)
    if not chosen:
        raise UserError(
            f"--trainable {selection} selects no parameter of {type(model).__name__} (names look "
            f"like {min(names)!r})"
        )
    return chosen


def _matching(names: set[str], pattern: str) -> set[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--trainable regex:{pattern} is no regular expression: {error}") from error
    return {name for name in names if expression.search(name)}


def _simple(model: nn.Module, names: set[str], part: str) -> set[str]:
    if part == "full":
        return names
    if part == "biases":
        return {name for name in names if name.rpartition(".")[2] in ("bias", "beta")}
    if part == "norms":
        prefixes = [n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()]
        return {name for name in names if name.rpartition(".")[0] in prefixes}
    if part.startswith("regex:"):
        return _matching(names, part.removeprefix("regex:"))
    if part.startswith("layers:"):
        return _layers(model, names, part.removeprefix("layers:"))
    raise UserError(f"--trainable must be made of {KEYWORDS}; got {part!r}")


def _layers(model: nn.Module, names: set[str], text: str) -> set[str]:
    stacks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not stacks:
        raise UserError(f"--trainable layers: {type(model).__name__} has no stack of layers")
    prefix, stack = max(stacks, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    count = len(stack)
    try:
        if ":" in text:
            bounds = [int(b) if b else None for b in text.split(":")]
            chosen = list(range(count))[slice(*bounds)]
        else:
            chosen = [range(count)[int(index)] for index in text.split(",")]
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"--trainable layers:{text} must be a slice or indices of {count} layers (layers:-4:, "
            f"layers:0,5)"
        ) from error
    starts = tuple(f"{prefix}.{index}." for index in chosen)
    return {name for name in names if starts and name.startswith(starts)}


def takes(model: nn.Module, argument: str) -> bool:
    """Whether ``model.forward`` names an argument (of the base model under adapters)."""
    holder: Any = model
    inner = holder.get_base_model() if hasattr(model, "get_base_model") else holder
    return argument in inspect.signature(inner.forward).parameters
