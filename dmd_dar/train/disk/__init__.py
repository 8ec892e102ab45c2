"""What a run keeps on disk: folder, log, checkpoints, exported students and their cards."""
