"""What prefill and decode servers have in common: stream records, answers, and the loop that
carries plans out."""
