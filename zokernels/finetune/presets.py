"""The demo: a configuration like any other, on a real model and real text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zokernels.finetune import assets

DEMO: dict[str, Any] = {
    "preset": "demo",
    "task": "classify",
    "text_column": "sentence",
    "label_column": "label",
    "prompt": "Review: {sentence}\nSentiment:",
    "verbalizers": {"0": " negative", "1": " positive"},
    "objective": "candidates",
    "trainable": r"regex:^model\.norm\.",
    "steps": 60,
    "lr": 5.0,
    "eps": 0.1,
    "batch_size": 16,
    "num_directions": 32,
    "schedule": "linear",
    "max_length": 64,
    "seed": 0,
    "repeats": 3,
    "eval_limit": 400,
    "output": "runs/demo",
}


def demo(cache_dir: str | None, log: Callable[[str], None]) -> dict[str, Any]:
    """The demo's options, with its model and data fetched (once) and named.

    Raises:
        UserError: they cannot be fetched.
    """
    folder = assets.cache_folder(cache_dir)
    for archive in (assets.MODEL, assets.REVIEWS):
        log(f"{archive.title}: {archive.licence}, {archive.url}")
    model = assets.smollm2(folder, log)
    parts = assets.reviews(folder, log)
    return {
        **DEMO,
        "model": str(model),
        "data": str(parts["train"]),
        "eval_data": str(parts["test"]),
    }
