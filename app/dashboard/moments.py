"""Points in time as a person reads them."""

from datetime import UTC, datetime


def readable_time(created: object) -> str:
    """Return a manifest's time of making, ISO 8601, as ``25 Nov 2026, 16:37 UTC``; what is none unchanged."""
    try:
        moment = datetime.fromisoformat(str(created))
    except ValueError:
        return str(created)
    zone = moment.astimezone(UTC) if moment.tzinfo else moment
    return f"{zone.day} {zone:%b %Y, %H:%M}{' UTC' if moment.tzinfo else ''}"
