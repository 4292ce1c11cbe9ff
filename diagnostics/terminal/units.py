"""Numbers with units, for people."""


def readable_bytes(count: float) -> str:
    """Write a number of bytes with the binary unit that fits: ``189 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
