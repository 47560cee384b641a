"""The hospital's half of a run: what it reads of its patients, and what it lets out."""
