"""A reader of the pages."""

from html.parser import HTMLParser

import pytest

VOID = {"img", "meta", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """The page's elements, links, sources and text; fails on elements that are not closed in order."""

    def __init__(self, page, between=""):
        super().__init__()
        self.open, self.tags, self.sources, self.links, self.ids, self.text = [], [], [], [], set(), ""
        self.between = between  # put before each piece of text
        self.feed(page)
        assert self.open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open += [] if tag in VOID else [tag]
        values = dict(attributes)
        self.sources += [values["src"]] if "src" in values else []
        self.links += [values[name] for name in ("href", "xlink:href") if name in values]
        self.ids |= {values["id"]} if "id" in values else set()

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.text += self.between + data


@pytest.fixture
def page_of():
    """Reads the text of a page."""
    return Page
