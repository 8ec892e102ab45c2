"""Several runs: which may be compared, the endpoint over training seeds, controls, the wording."""
