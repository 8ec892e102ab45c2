"""How a distillation is assembled from its configuration, and run."""
