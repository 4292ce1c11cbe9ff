"""Text that is not ours, made safe for Markdown."""


def md(text: object) -> str:
    """Return text that Markdown shows as it is: names of models, files and prompts are not ours."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]()#+-.!|<>$~:" else c for c in str(text)).replace("\n", " ")
