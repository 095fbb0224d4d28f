"""What a store raises when it, or what is put into it, does not check out."""


class StoreError(Exception):
    """A store that must not be used. The message names the file, what was found and expected."""
