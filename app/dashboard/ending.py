"""How a page ends early: Streamlit's own ``st.stop`` would end the app's frame around it, too."""

from typing import NoReturn


class PageEndedError(Exception):
    """A page has said all that it has to say."""


def end_page() -> NoReturn:
    """End the page, but not what stands around it, such as its address and the sidebar."""
    raise PageEndedError
