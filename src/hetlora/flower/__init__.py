"""The same run over Flower: its message API carries our tasks and updates; no strategy of Flower's decides anything.

Needs ``pip install 'hetlora[flower]'``. The server's side is `engine`, `membership`, `remote_experiment` and `server_app`; a
client's is `client_app`, a thin process that Flower starts for every message, `client_process`, the process of the client's own
that outlives them, and `client_runtime`, what is done in it.
"""
