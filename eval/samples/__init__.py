"""Images: read from files or sampled from networks, shared out among processes, and what they cost."""
