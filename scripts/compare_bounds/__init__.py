"""Which upper bound a mean NLL increase may be certified by: simulated texts on which the truth is known."""
