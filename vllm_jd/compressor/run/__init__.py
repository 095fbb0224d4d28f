"""A run of the compressor: clusters, modules, and the generation that is published."""
