"""What is watched while a run goes on: preflight, health, advice, failures."""
