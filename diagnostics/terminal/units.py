"""Numbers with units and times, for people."""

from datetime import UTC, datetime

# Not strftime's, which follow the machine's language.
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def readable_bytes(count: float) -> str:
    """Write a number of bytes with the binary unit that fits: ``189 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def readable_time(moment: object) -> str:
    """Write a manifest's time as ``25 Nov 2026, 16:37 UTC``; what is no time stays as it is, and nothing is ""."""
    try:
        time = datetime.fromisoformat(str(moment or ""))
    except ValueError:
        return str(moment or "")
    if time.tzinfo is not None:
        time = time.astimezone(UTC)
    zone = "" if time.tzinfo is None else " UTC"
    return f"{time.day} {MONTHS[time.month - 1]} {time:%Y, %H:%M}{zone}"
