"""`streamfill bench router`: the router as a process on one core, between a load and fake servers.

* ``grpc_frames``, ``grpc_connection``: as much of HTTP/2 as a gRPC client needs, at a few
  microseconds a message, so that the load is not what is measured.
* ``segments``: requests as bytes; a segment says in its token ids when it was sent.
* ``stream_load``, ``http_load``: the load, each in a process of its own.
* ``fake_server``: a prefill server that computes nothing; ``fake_backend``: an HTTP server for
  other routers.
* ``processes``: starts all of them; ``profile``: what takes the router's time.
"""
