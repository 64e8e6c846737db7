"""Other packages' training loops with zeroth-order steps; a module imports its package.

:mod:`zokernels.integrations.transformers`: transformers' Trainer.
"""
