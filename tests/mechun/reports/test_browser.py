"""The page in headless Chromium: no console error, no request to the network, sorting and filtering at work.

Spoken to over DevTools' pipe, so that nothing but the browser is needed.
"""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mechun.reports.building import render_page
from tests.mechun.reports.small_evidence import make_evidence

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")]


class Browser:
    """One tab, driven by DevTools messages that end in a zero byte."""

    def __init__(self, profile: Path):
        into, self.out = os.pipe()
        self.read_end, back = os.pipe()
        command = f"exec {CHROMIUM} {FLAGS} --user-data-dir={profile} --remote-debugging-pipe 3<&{into} 4>&{back}"
        self.process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(into, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(into)
        os.close(back)
        self.buffer, self.number, self.events = b"", 0, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        number = self.number
        while True:
            answer = self.receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self) -> dict:
        while b"\0" not in self.buffer:
            part = os.read(self.read_end, 1 << 16)
            assert part, "the browser went away"
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, path: Path) -> None:
        self.ask("Page.navigate", url=path.as_uri())
        while self.receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str):
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def faults(self) -> list:
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)
        os.close(self.out)
        os.close(self.read_end)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page([make_evidence()]), encoding="utf-8")
    browser.open(path)
    return path


def test_opens_without_error_and_without_network(browser, page):
    assert browser.faults() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.run("document.querySelectorAll('svg').length") >= 2


def test_the_policy_holds_against_a_script_that_got_in(browser, page):
    """The page's own guard: were markup injected after all, it could neither run nor reach out."""
    browser.run("window.ran = false; const s = document.createElement('script'); s.text = 'window.ran = true'")
    browser.run("document.body.append(s)")
    assert browser.run("window.ran") is False
    browser.run("const i = new Image(); i.src = 'http://127.0.0.1:9/x'; document.body.append(i)")
    blocked = [event for event in browser.faults() if "Content Security Policy" in json.dumps(event)]
    assert len(blocked) >= 2
    browser.events.clear()
    browser.open(page)
    assert browser.faults() == []


def test_sorts_by_a_column_both_ways_with_the_missing_last(browser, page):
    scores = "Array.from(document.querySelectorAll('table[data-sortable] tbody tr'), r => r.cells[4].dataset.value)"
    click = "document.querySelectorAll('table[data-sortable] th button')[4].click()"
    assert browser.run("document.querySelectorAll('table[data-sortable] th')[4].textContent") == "Score"
    browser.run(click)
    first = browser.run(scores)
    browser.run(click)
    second = browser.run(scores)
    assert first[-1] == second[-1] == ""
    assert sorted(map(float, first[:-1])) in ([float(v) for v in first[:-1]], [float(v) for v in second[:-1]])
    assert first[:-1] == second[:-1][::-1]
    assert browser.run("document.querySelector('th[aria-sort]').textContent") == "Score"


def test_filters_by_text_and_band(browser, page):
    shown = "Array.from(document.querySelectorAll('table[data-sortable] tbody tr')).filter(r => !r.hidden).length"
    type_in = "(v => {const i = document.querySelector('input'); i.value = v; i.dispatchEvent(new Event('input'))})"
    choose = "(v => {const s = document.querySelector('select'); s.value = v; s.dispatchEvent(new Event('change'))})"
    assert browser.run(shown) == 30
    browser.run(f"{type_in}('Person 2')")
    assert browser.run(shown) == 11  # 2 and 20 to 29
    browser.run(f"{choose}('hard')")
    assert browser.run(shown) == 1
    assert browser.run("document.querySelector('output').textContent") == "1 of 30 facts"
    browser.run(f"{type_in}('')")
    browser.run(f"{choose}('')")
    assert browser.run(shown) == 30


def test_is_drawn_in_light_and_dark(browser, page, tmp_path):
    pictures = []
    for scheme in ("light", "dark"):
        browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        picture = base64.b64decode(browser.ask("Page.captureScreenshot", format="png")["data"])
        (tmp_path / f"{scheme}.png").write_bytes(picture)
        pictures.append((picture, browser.run("getComputedStyle(document.body).backgroundColor")))
    assert len(pictures[0][0]) > 5000 and pictures[0][0] != pictures[1][0]
    assert pictures[0][1] == "rgb(255, 255, 255)" != pictures[1][1]


def test_is_complete_without_scripts(browser, page):
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(page)
    document = browser.ask("DOM.getDocument")["root"]["nodeId"]
    rows = browser.ask("DOM.querySelectorAll", nodeId=document, selector="tbody tr[data-band]")["nodeIds"]
    hidden = browser.ask("DOM.querySelectorAll", nodeId=document, selector=".controls[hidden]")["nodeIds"]
    browser.ask("Emulation.setScriptExecutionDisabled", value=False)
    assert len(rows) == 30 and len(hidden) == 1
