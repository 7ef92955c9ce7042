"""The HTTP service of the router: the OpenAI API, and context streamed over a WebSocket or an
upload. On top of ``router.interface``, next to gRPC and in the same loop."""
