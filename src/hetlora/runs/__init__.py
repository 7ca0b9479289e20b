"""One run: its loop, records, checkpoint and trackers, what is shown of it, and how its folder is read again."""
