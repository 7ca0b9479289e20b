"""`hetlora data`: the rows of every client, before training."""
