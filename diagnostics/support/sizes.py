"""Numbers of tokens as people write them: 2048, 4K."""

from diagnostics.support.errors import UserError


def parse_length(text: str, *, most: int) -> int:
    """Return a number of tokens, 1 to ``most``, where K stands for 1024; raise UserError for anything else."""
    number = text.strip().upper()
    digits, factor = number.removesuffix("K"), 1024 if number.endswith("K") else 1
    if not (digits.isascii() and digits.isdigit()) or not 0 < int(digits[:15]) * factor <= most:
        raise UserError(f"length {text.strip()!r} is not a number of tokens, such as 2048 or 4K, up to {most}")
    return int(digits) * factor
