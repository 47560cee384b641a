"""How a run's messages travel."""
