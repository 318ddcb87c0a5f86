"""The page of a run in a real browser: for every reader, on every screen, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from browsing import SCREENS, assert_readable

# One worker trains the run, once for these tests and for those of test_report.py.
pytestmark = pytest.mark.xdist_group("report")


@pytest.fixture
def open_page(browser, reported) -> Iterator[Any]:
    """open_page(390, "dark") is the run's page on a screen of this width, and the addresses it asks for."""
    contexts = []

    def open_it(width: int, scheme: str) -> tuple[Any, list[str]]:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        asked: list[str] = []

        def note(route: Any) -> None:
            asked.append(route.request.url)
            route.continue_()

        context.route("**/*", note)
        page = context.new_page()
        page.goto((reported.cwd / "run/report.html").as_uri())
        return page, asked

    yield open_it
    for context in contexts:
        context.close()


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_a_page_is_for_every_reader(open_page, reported, width, scheme):
    page, asked = open_page(width, scheme)
    assert_readable(page)
    # Nothing is asked for but the page itself.
    assert asked == [(reported.cwd / "run/report.html").as_uri()]


@pytest.mark.long
def test_the_schemes_differ_and_both_can_be_read(open_page):
    colours = {}
    for scheme in ("light", "dark"):
        page, _ = open_page(1280, scheme)
        style = "getComputedStyle(document.querySelector('{}')).{}"
        ground = page.evaluate(style.format("body", "backgroundColor"))
        curve = page.evaluate(style.format("#curves svg [id*=line2d] path[style*=orange]", "stroke"))
        colours[scheme] = (ground, curve)
    assert colours["light"] == ("rgb(246, 245, 241)", "rgb(180, 83, 9)")
    assert colours["dark"] == ("rgb(17, 21, 26)", "rgb(240, 163, 94)")


@pytest.mark.long
def test_the_keyboard_reaches_everything(open_page):
    page, _ = open_page(1280, "light")
    reached = []
    for _ in range(100):
        page.keyboard.press("Tab")
        focused = page.evaluate("[document.activeElement.tagName, document.activeElement.className]")
        if focused[0] == "BODY":
            break
        reached.append(focused)
    assert reached[0] == ["A", "skip"]
    tags = [tag for tag, _ in reached]
    assert tags.count("SUMMARY") == page.locator("summary").count()
    assert reached.count(["DIV", "scroll"]) == page.locator(".scroll:visible").count()
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details[open]").count() == 1


@pytest.mark.long
def test_on_paper_it_is_light_without_what_cannot_be_clicked_there(open_page):
    page, _ = open_page(1280, "dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden()
    assert page.locator("summary").first.is_hidden()
    assert page.locator("#curves svg").first.is_visible()
    assert len(page.pdf()) > 10_000
