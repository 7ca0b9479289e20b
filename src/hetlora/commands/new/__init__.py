"""A configuration for a person's own rows: `hetlora new`."""
