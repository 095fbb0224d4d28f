"""A running server's fleet: adapters that come, change and go, over HTTP and from a folder."""
