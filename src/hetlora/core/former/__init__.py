"""Modules that have moved, under their former names for one release; `hetlora.__path__` leads here."""
