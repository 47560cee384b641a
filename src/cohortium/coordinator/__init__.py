"""The coordinator's half of a run. It sees masked vectors and their sums, never a site's own."""
