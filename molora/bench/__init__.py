"""`molora bench`: what a mixture costs, beside its peers in the same run. Correctness comes first."""
