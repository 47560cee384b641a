"""Differential privacy: clipping, integer noise shares, what they cost, and attacks that check it."""
