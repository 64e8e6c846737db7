"""Data of a federation: records, prompts, encoded tasks, and how examples spread over clients."""

from fedzo.data.partition import Split, partition
from fedzo.data.tasks import CausalTask, MaskedTask, load_task
from fedzo.data.templates import TEMPLATES, Classification, Instruction, Text, custom

__all__ = [
    "TEMPLATES",
    "CausalTask",
    "Classification",
    "Instruction",
    "MaskedTask",
    "Split",
    "Text",
    "custom",
    "load_task",
    "partition",
]
