"""`hetlora doctor`: validate this machine, a configuration, and two tiny rounds of its federation."""
