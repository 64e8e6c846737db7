"""The folder of a run: what is in it, and that it is never half written.

It holds ``config.json``, ``before.json``, ``summary.json``, ``loss.png`` and for each seed
``metrics.jsonl``, ``trajectory.zo`` (the journal: the fine-tuned model as seeds and numbers),
``checkpoint.json`` and ``result.json``.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zokernels._files import write_atomically
from zokernels.finetune.config import Config, UserError, build
from zokernels.finetune.ranks import Ranks
from zokernels.trajectory import Trajectory
from zokernels.trajectory_format import TrajectoryError

CONFIG, BEFORE, SUMMARY, PICTURE = "config.json", "before.json", "summary.json", "loss.png"
METRICS, JOURNAL, CHECKPOINT, RESULT = (
    "metrics.jsonl",
    "trajectory.zo",
    "checkpoint.json",
    "result.json",
)
ADAPTER, WEIGHTS = "adapter_start.safetensors", "weights"


class Folder:
    """A folder that the first rank reads for all and alone writes.

    Args:
        path: of the folder.
        ranks: every one of which calls the same methods; ``write``, ``append`` and ``keep`` may be
            called by the first one alone, too.
    """

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self.path, self.ranks = path, ranks

    def open(self, config: Config) -> None:
        """Create it for a new run, or check that it holds the run to go on with.

        Raises:
            UserError: it holds another run, or none, or cannot be created.
        """
        if not self.ranks.first:
            return
        if config.resume:
            changed = build(resumed_options(config.output)).difference(config)
            if changed:
                raise UserError(f"--resume: {changed}; a resumed run must have the same options")
        elif (self.path / CONFIG).is_file():
            raise UserError(
                f"--output {self.path} already holds a run: add --resume to go on with it, or name "
                f"another folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {self.path} cannot be created: {error}") from error

    def part(self, name: str) -> Folder:
        """A folder inside."""
        if self.ranks.first:
            (self.path / name).mkdir(exist_ok=True)
        return Folder(self.path / name, self.ranks)

    def read(self, name: str) -> Any:
        """The value in a JSON file; None without one."""

        def value() -> Any:
            path = self.path / name
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

        return self.ranks.from_first(value)

    def write(self, name: str, value: Any) -> None:
        """A JSON file, whole or not at all."""
        if self.ranks.first:
            write_atomically(self.path / name, (json.dumps(value, indent=1) + "\n").encode())

    def append(self, name: str, values: dict[str, Any]) -> None:
        """One more line of a JSONL file."""
        if self.ranks.first:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def keep(self, name: str, steps: int) -> None:
        """Drop the lines of a JSONL file that are of step ``steps`` or later, or torn."""
        path = self.path / name
        if not self.ranks.first or not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                if json.loads(line)["step"] < steps:
                    kept.append(line + "\n")
        write_atomically(path, "".join(kept).encode())

    def journal(self, config: Config, seed: int) -> Trajectory:
        """The journal of a seed: open on the first rank, and a copy in memory on the others.

        Raises:
            UserError: it cannot be read or written.
        """

        def opened() -> Trajectory:
            metadata = {
                "base_model": config.model,
                "trainable": config.trainable,
                "adapter_start": f"../{ADAPTER}" if config.trainable == "lora" else None,
                "seed": seed,
            }
            try:
                with warnings.catch_warnings():
                    # A record cut short by a kill lies after the checkpoint, and its step is made
                    # again.
                    warnings.simplefilter("ignore")
                    return Trajectory.open(self.path / JOURNAL, metadata=metadata, recover=True)
            except (TrajectoryError, OSError) as error:
                raise UserError(f"--resume: {error}") from error

        return self.ranks.from_first(opened)

    def adapter(self, model: nn.Module) -> None:
        """Keep new adapter weights, which the trajectory starts from; load them when kept."""
        moving = {n: p for n, p in model.named_parameters() if p.requires_grad}

        def start() -> dict[str, torch.Tensor]:
            from safetensors.torch import load_file, save

            path = self.path / ADAPTER
            if path.is_file():
                return load_file(path)
            values = {n: p.detach().cpu().contiguous() for n, p in moving.items()}
            write_atomically(path, save(values))
            return values

        saved = self.ranks.from_first(start)
        with torch.no_grad():
            for name, parameter in moving.items():
                parameter.copy_(saved[name])


def resumed_options(output: str) -> dict[str, Any]:
    """The options of the run in a folder, for ``--resume`` without repeating them.

    Raises:
        UserError: there is no run, or its configuration cannot be read.
    """
    path = Path(output) / CONFIG
    if not path.is_file():
        raise UserError(f"--resume: {output} holds no run to go on with")
    try:
        options: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--resume: {path} is damaged: {error}") from error
    if not isinstance(options, dict):
        raise UserError(f"--resume: {path} is damaged: it holds no object")
    return options
