"""What a store raises when it, or what is put into it, does not check out."""


class StoreError(Exception):
    """A store that must not be used. The message names the file, what was found and expected."""


def told(error: ValueError) -> str:
    """What a pydantic error says first, or what any other says, without pydantic's own words:
    `field: message`."""
    found = getattr(error, "errors", None)
    if found is None:
        return str(error)
    first = found(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
