"""One HTML file that holds a model and writes text in any browser: `write_page`."""

from kmixer.interop.page.file import write_page

__all__ = ["write_page"]
