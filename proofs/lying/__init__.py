"""Modules that only the processes of lying nodes import."""
