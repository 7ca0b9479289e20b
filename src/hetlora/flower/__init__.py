"""Runs over Flower's message API, without Flower's strategies. Needs ``pip install 'hetlora[flower]'``.

Server: `engine`, `membership`, `remote_experiment` and `server_app`. Client: `client_app`, a thin process that Flower starts
for every message, and `client_process`, a lasting process that executes `client_runtime`. On one machine: `rehearsal` starts
a `local_federation` of real processes with its own `credentials`.
"""
