"""CURVE on the ZeroMQ links between the processes of a cluster: keys, and who is let in."""
