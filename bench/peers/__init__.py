"""Other implementations of the same step, to compare with."""
