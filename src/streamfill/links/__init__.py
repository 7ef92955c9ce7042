"""The server's end of the ZeroMQ links: exactly-once delivery of stream operations, heartbeats,
registration."""
