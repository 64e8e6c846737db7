"""Batches of general text at the server: what masks and GradIP are calibrated on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedzo.data.sources import read_records
from zokernels.finetune.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN = "builtin"

# Share of the tokens a masked language model has to guess (Devlin et al. 2019).
_MASKED = 0.15


def calibration_batches(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    masked: bool = False,
    batches: int = 16,
    batch_size: int = 8,
    length: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[dict[str, Tensor]]:
    """Batches for ``model(**batch).loss``: ``input_ids``, ``attention_mask``, ``labels``.

    Documents are joined, cut into blocks of ``length`` tokens, and blocks chosen at random.
    ``labels`` are the tokens themselves (the model shifts them), or for a masked language model 15%
    of them, masked in the input. All int64 ``[batch_size, length]``.

    Args:
        tokenizer: of the model.
        source: file or data set with a ``text`` column, such as a sample of C4; ``builtin`` is the
            English text of Python's own documentation, a stand-in that needs no file and no
            client's data.
        masked: whether the model is a masked language model.
        batches, batch_size, length: how much text.
        seed: of the choice of blocks and masks.
        device: of the tensors.

    Raises:
        UserError: no text, or fewer tokens than one batch.
    """
    blocks = _blocks(tokenizer, _documents(source), length, masked)
    if len(blocks) < batch_size:
        raise UserError(
            f"--calibration {source} has {len(blocks)} blocks of {length} tokens; a batch needs "
            f"{batch_size}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(blocks), generator=generator)[: batches * batch_size]
    made = []
    for chosen in order[: len(order) // batch_size * batch_size].view(-1, batch_size):
        ids = blocks[chosen]
        labels = ids.clone()
        if masked:
            hidden = torch.rand(ids.shape, generator=generator) < _MASKED
            hidden[:, 0] = hidden[:, -1] = False
            hidden[:, 1] |= ~hidden.any(1)
            labels[~hidden] = -100
            ids = ids.masked_fill(hidden, int(tokenizer.mask_token_id))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        made.append({name: tensor.to(device) for name, tensor in batch.items()})
    return made


def _documents(source: str) -> list[str]:
    if source == BUILTIN:
        import pydoc_data.topics

        return list(pydoc_data.topics.topics.values())
    records = read_records(source, option="--calibration", known=("text",), columns=("text",))
    if "text" not in records[0]:
        raise UserError(
            f"--calibration: {source} has no column 'text'; the columns are {', '.join(records[0])}"
        )
    return [str(record["text"]) for record in records]


def _blocks(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], length: int, masked: bool
) -> Tensor:
    stream: list[int] = []
    end = [] if masked or tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for text in documents:
        stream += tokenizer(text, add_special_tokens=False, verbose=False).input_ids + end
    inner = length - 2 if masked else length
    count = len(stream) // inner
    blocks = torch.tensor(stream[: count * inner], dtype=torch.int64).view(count, inner)
    if not masked:
        return blocks
    first, last = (
        torch.full((count, 1), int(token))
        for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)
    )
    return torch.cat([first, blocks, last], 1)
