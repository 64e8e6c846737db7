"""Fine-tuning from the command line: configuration, data, models, training and reports."""

from zokernels.finetune.config import Config, UserError

__all__ = ["Config", "UserError"]
