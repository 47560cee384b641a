"""The world outside: files, frames and bundled data behind the ports of other rooms."""
