"""How many tokens fit the positions of a model: one rule for diagnosis, scoring, generation and training."""


def prompt_room(positions: int | None, n_new: int) -> int | None:
    """Return how many prompt tokens fit with ``n_new`` tokens after them; None without a limit, negative for none.

    The last new token is predicted and never run, so it needs no position: n + n_new - 1 tokens run in total. If it
    does run, like the last token of a training example, count one more token.
    """
    return None if positions is None else positions - max(n_new - 1, 0)
