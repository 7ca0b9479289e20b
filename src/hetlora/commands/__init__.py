"""The commands: one module or package per command, none of which imports another."""
