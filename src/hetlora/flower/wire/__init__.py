"""The bytes of tasks and updates between server and clients."""
