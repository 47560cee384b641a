"""Values that every other room shares: the study, its messages, stages, bytes and errors. No I/O."""
