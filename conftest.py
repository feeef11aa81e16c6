"""What pytest must know of the notebooks in notebooks/ and of all tests."""

import os

import pytest

# Nothing is ever fetched by a test; a library that tries fails at once instead of waiting for an answer.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collectstart(collector):
    """Compare the text of notebook outputs alone: HTML, JSON and widgets repeat it with ids that change."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += (
            "text/html",
            "text/latex",
            "text/markdown",
            "application/json",
            "application/javascript",
            "application/vnd.jupyter.widget-view+json",
            "image/svg+xml",
            "application/pdf",
            "stderr",
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Where tests run on several cores, keep those of a file together, and all notebooks: each needs what others computed."""
    from xdist.scheduler import LoadFileScheduling

    class NotebooksTogether(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "notebooks" if nodeid.startswith("notebooks/") else super()._split_scope(nodeid)

    return NotebooksTogether(config, log)
