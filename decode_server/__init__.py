"""The decode server: takes KV in, and goes on with answers whose first token was sampled
elsewhere."""
