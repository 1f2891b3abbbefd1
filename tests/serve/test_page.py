"""The page in a browser: it colours what surprises the model as one types, and writes on."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.conftest import serving

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("chromium or chromedriver is not installed", allow_module_level=True)

TEXT = "KING RICHARD:\nNow is the winter of our Zdiscontent"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def wait_for(condition: Any, seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def painted(browser: Any) -> list[tuple[str, str, str]]:
    """(text, title, ground) of what is shown."""
    of_span = "[s.textContent, s.title, s.style.backgroundColor]"
    script = f"return [...document.querySelectorAll('#shown span')].map(s => {of_span})"
    return [tuple(span) for span in browser.execute_script(script)]


def shown(browser: Any) -> str:
    return "".join(text for text, _, _ in painted(browser))


def test_the_page_paints_what_is_typed_and_writes_on(browser: Any) -> None:
    with serving(KMIXER_API_KEY="sesame-123") as server:
        browser.get(server.url)
        text, key = browser.find_element("id", "text"), browser.find_element("id", "key")
        text.send_keys("KING")
        wait_for(lambda: "key: it is missing" in browser.find_element("id", "said").text)
        key.send_keys("sesame-123")
        browser.get_log("browser")  # the refusal above is one
        text.clear()
        text.send_keys(TEXT)
        spans = wait_for(lambda: painted(browser) if shown(browser) == TEXT else None)
        bits = {index: float(title.split()[0]) for index, (_, title, _) in enumerate(spans) if title[0].isdigit()}
        assert len(bits) == len(TEXT) - 1
        odd = TEXT.index("Z")
        assert bits[odd] == max(bits.values()) > 8
        strength = [float(ground.rpartition(",")[2].rstrip(")")) for *_, ground in spans[1:]]
        assert strength[odd - 1] == max(strength)
        assert re.fullmatch(
            r"[\d.]+ bits per token, [\d.]+ bits in all, 50 tokens", browser.find_element("id", "said").text
        )
        text.send_keys(" ever")
        wait_for(lambda: shown(browser) == TEXT + " ever")
        for name, value in (("tokens", "60"), ("seed", "7")):
            field = browser.find_element("id", name)
            field.clear()
            field.send_keys(value)
        written = []
        for _ in range(2):
            browser.find_element("id", "go").click()
            wait_for(lambda: len(shown(browser)) == len(TEXT) + 5 + 60)
            written.append(text.get_property("value"))
            assert shown(browser) == written[-1]
            browser.execute_script("arguments[0].value = arguments[1]", text, TEXT + " ever")
            text.send_keys(" \b")
            wait_for(lambda: shown(browser) == TEXT + " ever")
        assert written[0] == written[1], "one seed, two texts"
        browser.find_element("id", "go").click()
        wait_for(lambda: len(shown(browser)) == len(TEXT) + 65)
        assert browser.get_log("browser") == []
