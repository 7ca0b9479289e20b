"""The same run over Flower: its message API carries our tasks and updates; no strategy of Flower's decides anything.

Needs ``pip install 'hetlora[flower]'``. The server's side is `engine`, `roll`, `deployment` and `server_app`; a client's is
`client_app`, a thin process that Flower starts for every message, `worker`, the process of the client's own that outlives them,
and `local`, what is done in it.
"""
