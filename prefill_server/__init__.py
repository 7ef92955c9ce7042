"""The prefill server: computes context as it arrives, samples the first token, hands the KV
over."""
