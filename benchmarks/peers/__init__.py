"""Shared by the comparisons with other simulators: the work of both sides, and a PEFT user's client."""
