"""The page in a browser: it draws, asks nothing of the network, and answers to its controls."""

import re
import shutil

import pytest

from lit_rlhf.report.page import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def browser():
    """Return Chromium, for all tests of this file."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("there is no Chromium on this machine (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=list(QUIET))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(browser, run_of_ppo, other_run, tmp_path_factory):
    """Return the page about two runs, opened by width and theme, and all that the browser complained about."""
    file = write_report([run_of_ppo[0], other_run], tmp_path_factory.mktemp("pages") / "both.html", pictures=False)
    opened, complaints = {}, []
    for width, scheme in ((1400, "light"), (390, "dark")):
        page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:")) else complaints.append(request.url),
        )
        page.goto(file.as_uri(), timeout=60_000)
        page.wait_for_selector("html[data-drawn]", timeout=60_000)
        opened[scheme] = page
    return opened, complaints


def texts(page, selector):
    return page.locator(selector).all_inner_texts()


def numbers(page, name):
    """The number after a name in the line above each response."""
    found = [re.search(rf"{name} (−|-)?([\d.]+)", text.replace("\n", " ")) for text in texts(page, ".facts")]
    return [(-1 if match.group(1) else 1) * float(match.group(2)) for match in found if match]


def test_it_draws_without_complaint_and_without_overflow(pages):
    opened, complaints = pages
    for scheme, page in opened.items():
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        assert page.locator(".chart canvas").count() == page.locator(".chart").count() > 10
        widths = page.evaluate(
            "[...document.querySelectorAll('.chart')].map(c => c.querySelector('canvas').clientWidth - c.clientWidth)"
        )
        assert max(widths) <= 0
        assert page.evaluate(  # something is drawn in each
            "[...document.querySelectorAll('canvas')].every(c => c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data.some((x, i) => i % 4 == 3 && x > 0))"
        )
    assert complaints == []


def test_it_compares_the_runs(pages):
    page = pages[0]["light"]
    assert texts(page, "#differences tbody tr") == ["model.kl.coef\t0.05\t0.5"]
    assert texts(page, "#differences thead .run") == ["ppo", "careful"]
    assert "Time by phase: careful" in page.evaluate("DATA.charts.map(c => c.title.text || c.title)")


def test_responses_are_sorted_searched_and_coloured(pages):
    page = pages[0]["light"]
    assert page.locator("#stage").input_value() == "val"
    assert page.locator(".response").first.locator(".caption").count() == 2  # its own and the reference's
    page.select_option("#sort", "-score")
    scores = numbers(page, "score")
    assert len(scores) == 24
    assert scores == sorted(scores, reverse=True)
    page.select_option("#sort", "length")
    assert numbers(page, "length") == sorted(numbers(page, "length"))
    page.select_option("#stage", "train")
    page.select_option("#sort", "-iteration")
    assert numbers(page, "iteration") == sorted(numbers(page, "iteration"), reverse=True)
    page.select_option("#run", "ppo")
    assert texts(page, "#count") == ["12 of 12 responses"]

    page.select_option("#color", "advantage")
    first = page.locator(".token").first
    before = first.evaluate("x => x.style.backgroundColor")
    assert "rgba" in before
    assert texts(page, "#legend em") == ["advantage, of each token; only training measures it"]
    first.hover()
    assert re.search(r"advantage: [+-]?\d+\.\d{3}", texts(page, "#tip")[0])
    page.select_option("#color", "value")
    assert first.evaluate("x => x.style.backgroundColor") != before
    page.select_option("#color", "")
    assert first.evaluate("x => x.style.backgroundColor") == ""
    assert page.locator("#legend").is_hidden()

    page.select_option("#run", "")
    page.fill("#search", "ONERROR")  # a response that is HTML is shown as text
    assert texts(page, "#count") == ["1 of 1 responses"]
    assert "<img src=x" in texts(page, ".response")[0]
    assert pages[1] == []


def test_the_toggle_switches_light_and_dark(pages):
    page = pages[0]["dark"]
    ink = page.evaluate("getComputedStyle(document.body).color")
    page.click("#theme")
    page.wait_for_selector("html[data-drawn='light']")
    assert page.evaluate("getComputedStyle(document.body).color") != ink
