"""Chooses among the checkpoints of a finished run, and the strengths of its adapter, by pictures."""
