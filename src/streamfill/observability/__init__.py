"""What can be seen of a running cluster: lifetime events, metrics, tracing."""
