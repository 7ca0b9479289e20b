"""What a person asks for: a module or a package per command, none of which imports another."""
