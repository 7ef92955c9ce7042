"""What a status page shows of a running cluster, sampled while somebody looks."""
