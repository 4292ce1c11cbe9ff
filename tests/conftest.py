import os

import hypothesis
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
# Their assertions say what was compared, as those of test modules do.
pytest.register_assert_rewrite("tests.support")
# `make test` draws few examples, `make test-slow` many: --hypothesis-profile=at-length.
hypothesis.settings.register_profile("short", max_examples=25, deadline=None)
hypothesis.settings.register_profile("at-length", max_examples=100, deadline=None)
hypothesis.settings.load_profile("short")


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    # Workers beside each other would wait for each other's threads.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session", autouse=True)
def _findings_of_their_own(tmp_path_factory):
    """Keep what self-tests of tiny models find out of the user's cache."""
    from diagnostics.self_test import proof

    folder = tmp_path_factory.mktemp("self-tests")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "proofs_folder", lambda: folder)
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Tiny tensors gain nothing from a second thread, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smollm():
    from diagnostics.models.loading import load_model

    return load_model("smollm2-135m-instruct")


def pytest_addoption(parser):
    parser.addoption(
        "--sequential-sums", action="store_true", help="add float32 one number after the other, as some processors do"
    )


@pytest.fixture(scope="session", autouse=True)
def _sequential_sums(request):
    if not request.config.getoption("--sequential-sums"):
        yield
        return
    from tests.support.rounding import SequentialSums

    with SequentialSums():
        yield


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, for modules that begin with `tests.support.watched.require_browser`."""
    from browsing import browsing

    with browsing() as opened:
        yield opened
