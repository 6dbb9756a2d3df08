"""The page in a real Chromium, over a real server: it streams, stops, asks for the key, says errors in words.

What a model writes is never run, every text can be read in both themes, and everything is reached by keyboard and on a phone.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from pathlib import Path

import httpx
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
TIMEOUT_MS = 60_000  # the machine may be busy with other tests
KEY = "a-key-of-the-test"


CHATS = "**/v1/chat/completions"


def run_to_the_end(route):
    """Lengths are the test's to choose, not the model's."""
    route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra [dev]")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, request):
    """A function that opens the page in a browser of its own; what the console complains of fails the test."""
    contexts, complaints = [], []

    def open_it(url, *, ready=True, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        context.set_default_timeout(TIMEOUT_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.route(CHATS, run_to_the_end)
        page.goto(url)
        if ready:
            page.wait_for_selector("#health[data-state=good]")
        return page

    yield open_it
    for context in contexts:
        context.close()
    chromiums_own = r"Failed to load resource: (the server responded with a status of [45]\d\d|net::ERR_CONNECTION)"
    assert [c for c in complaints if not re.match(chromiums_own, c)] == []


def ask(page, text, **settings):
    for name, value in settings.items():
        page.evaluate(
            "([id, v]) => { const e = document.getElementById(id); e.value = v; e.dispatchEvent(new Event('input')); }", [name, value]
        )
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def wait_until(page, condition):
    """Playwright's own waiting needs eval, which the page's policy forbids."""
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(50)


def wait_idle(page):
    wait_until(page, "!document.body.classList.contains('running')")


def answer_of(page):
    return page.locator(".assistant .text").last.inner_text()


def test_it_streams_what_the_api_answers(open_page, server):
    page = open_page(server.url)
    requested = []
    page.on("request", lambda request: requested.append(request.url))
    assert page.locator("#empty").is_visible()
    ask(page, "The dog", temperature="0", max_tokens="200", seed="3", system="Be brief.", top_p="1")
    wait_idle(page)
    fields = {"temperature": 0, "max_tokens": 200, "seed": 3, "top_p": 1}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The dog"}]
    whole = server.client().chat.completions.create(model="apportion", messages=messages, extra_body={"ignore_eos": True}, **fields)
    shown, expected = answer_of(page), whole.choices[0].message.content
    assert shown.split() == re.sub(r"[`]", "", expected).split() or shown.split() == expected.split()
    foot = page.locator(".assistant .foot").inner_text()
    assert "first token" in foot and "tokens/s" in foot and "200 tokens" in foot and "cut at max tokens" in foot
    assert page.locator("#empty").is_hidden()
    assert requested and all(url.startswith(server.url) for url in requested)
    wait_until(page, "[...document.querySelectorAll('#models td')].some((cell) => Number(cell.textContent.replace(',', '')) >= 200)")
    assert re.search(r"\d", page.locator(".tile b").nth(1).inner_text())  # a time to first token was measured


def test_every_control_is_sent_and_what_is_empty_is_not(open_page, server):
    page = open_page(server.url)
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.url.endswith("/v1/chat/completions") else None)
    fields = {"temperature": 1.1, "top_p": 0.9, "top_k": 40, "max_tokens": 6, "seed": 7, "min_p": 0.02}
    fields |= {"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.2}
    ask(page, "Hello", **{name: str(value) for name, value in fields.items()}, stop="one\ntwo")
    wait_idle(page)
    assert "6 tokens" in page.locator(".assistant .foot").inner_text()
    page.click("#reset")
    ask(page, "Again", max_tokens="4")
    wait_idle(page)
    first, second = sent
    assert {name: first[name] for name in fields} == fields and first["stop"] == ["one", "two"]
    assert set(second) == {"model", "messages", "temperature", "top_p", "max_tokens", "stream", "stream_options"}
    [model] = server.get("/stats").json()["models"]
    assert model["ttft_count"] >= 2
    wait_until(page, "[...document.querySelectorAll('#models td')].some((cell) => /\\d ms$/.test(cell.textContent))")


def test_escape_stops_and_frees(open_page, server):
    page = open_page(server.url)
    ask(page, "A long story", max_tokens="1900", stop="")
    wait_until(page, "document.querySelector('.assistant .text')?.innerText.length > 40")
    assert page.locator("#send").get_attribute("aria-label") == "Stop"
    page.keyboard.press("Escape")
    wait_idle(page)
    assert "stopped" in page.locator(".assistant .foot").inner_text() and answer_of(page)
    assert page.locator("#send").get_attribute("aria-label") == "Send"

    def is_idle():
        [model] = server.get("/stats").json()["models"]
        return model["running"] == model["waiting"] == 0

    server.wait(is_idle, "the stopped request has ended")
    page.click("#clear")
    assert page.locator("#empty").is_visible() and page.locator(".log li").count() == 0


def test_lines_break_and_messages_send(open_page, server):
    page = open_page(server.url)
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#prompt") == "one\ntwo" and page.locator(".log li").count() == 0
    page.keyboard.press("Enter")
    assert page.locator(".user").inner_text() == "one\ntwo" and page.input_value("#prompt") == ""
    wait_idle(page)


def fake_stream(*events):
    return "".join(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events)


def chunk(**delta):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def test_model_text_is_never_run(open_page, server):
    page = open_page(server.url)
    evil = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>\n```html\n<b onclick=1>bold</b>\n```\n`x<y`"
    body = fake_stream(chunk(role="assistant", content=""), chunk(reasoning_content="<i>hm</i>"), chunk(content=evil), "[DONE]")
    page.route(CHATS, lambda route: route.fulfill(content_type="text/event-stream", body=body))
    ask(page, "<u>me</u>")
    wait_idle(page)
    shown = answer_of(page)
    assert "<img src=x onerror=" in shown and "<script>" in shown and page.title() == "apportion"
    assert page.locator(".log").locator("img, script, b, i, u").count() == 0
    assert page.locator(".assistant pre code").inner_text() == "<b onclick=1>bold</b>" and page.locator(".prose code").inner_text() == "x<y"
    assert page.locator(".user").inner_text() == "<u>me</u>" and page.locator("summary").inner_text() == "Thinking"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            {"status": 429, "body": json.dumps({"error": {"message": "9 sequences wait; try again later"}})},
            "9 sequences wait; try again later.",
        ),
        ({"status": 502, "body": "<html>"}, "The server answered with status 502."),
        ({"content_type": "text/event-stream", "body": fake_stream(chunk(content="Half"))}, "The answer ended early."),
        (
            {"content_type": "text/event-stream", "body": fake_stream(chunk(content="Half"), {"error": {"message": "the engine died"}})},
            "The engine died.",
        ),
    ],
)
def test_errors_are_said_and_can_be_tried_again(open_page, server, answer, said):
    page = open_page(server.url)
    page.route(CHATS, lambda route: route.fulfill(**{**answer, "status": answer.get("status", 200)}))
    ask(page, "x", max_tokens="8")
    error = page.locator(".error")
    assert error.locator("p").inner_text() == said
    wait_idle(page)
    page.route(CHATS, run_to_the_end)
    error.locator("button").click()
    wait_idle(page)
    assert page.locator(".error").count() == 0 and page.locator(".user").count() == 1 and page.locator(".assistant").count() == 1
    assert "8 tokens" in page.locator(".assistant .foot").inner_text()


def test_a_refusal_of_the_server_itself_is_said(open_page, server):
    page = open_page(server.url)
    ask(page, "x", top_k="-7")
    assert "top_k" in page.locator(".error p").inner_text()


def test_the_key_is_asked_for(open_page, start_server):
    server = start_server("--api-key", KEY)
    assert server.get("/stats").status_code == 401 and server.get("/").status_code == 200
    page = open_page(server.url, ready=False)
    dialog = page.locator("#key-dialog")
    dialog.wait_for(state="visible")
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    wait_until(page, "document.getElementById('key-why').textContent.includes('not accepted')")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#health[data-state=good]")
    ask(page, "Hello", max_tokens="4")
    wait_idle(page)
    assert "4 tokens" in page.locator(".assistant .foot").inner_text()
    assert page.evaluate("Object.keys(localStorage).some((name) => localStorage[name].includes('a-key'))") is False


def test_a_server_that_goes_is_noticed(open_page, start_server):
    server = start_server()
    page = open_page(server.url)
    server.stop()
    page.wait_for_selector("#health[data-state=bad]")
    assert page.locator("#health span").inner_text() == "No connection" and "Trying again" in page.locator("#live-note").inner_text()
    ask(page, "x")
    assert page.locator(".error p").inner_text() == "The server does not answer."


CONTRAST = (Path(__file__).parent / "contrast.js").read_text().partition("\n")[2].rstrip().removesuffix(";")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(open_page, server, scheme):
    page = open_page(server.url, color_scheme=scheme)
    ask(page, "Hello", max_tokens="8")
    wait_idle(page)
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert page.evaluate(CONTRAST) == []
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert page.evaluate(CONTRAST) == []
    page.reload()
    page.wait_for_selector("#health[data-state=good]")
    assert page.evaluate("document.documentElement.dataset.theme") == {"light": "dark", "dark": "light"}[scheme]


def test_everything_is_named_and_reached_by_keyboard(open_page, server):
    page = open_page(server.url)
    wait_until(page, "!document.getElementById('model').disabled")
    reached = []
    page.evaluate("document.body.tabIndex = -1; document.body.focus()")  # from the top; the message box has the focus at first
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e);
              const label = e.getAttribute("aria-label") || e.labels?.[0]?.textContent || e.textContent;
              const seen = s.outlineStyle !== "none" || getComputedStyle(e.parentElement).boxShadow !== "none";
              return [e.id || e.textContent.trim(), label.trim(), seen]; }"""
        )
        reached.append(found[0])
        assert found[1] and found[2], found
        if found[0] == "stop":
            break
    controls = ["model", "theme", "prompt", "send", "reset", "system", "temperature", "top_p", "top_k", "max_tokens", "seed", "min_p"]
    controls += ["presence_penalty", "frequency_penalty", "repetition_penalty", "stop"]
    assert reached[0].startswith("Skip") and [name for name in reached if name in controls] == controls


def test_a_phone_shows_one_view_at_a_time(open_page, server):
    page = open_page(server.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    ask(page, "Hello", max_tokens="200")
    wait_idle(page)
    gap = page.evaluate(
        "(() => { const b = document.getElementById('scroller'); return b.scrollHeight - b.scrollTop - b.clientHeight; })()"
    )
    assert gap < 40  # the newest line is in sight
    for view, inside in (("settings", "#temperature"), ("live", "#tiles"), ("chat", "#prompt")):
        page.click(f"[data-show={view}]")
        assert page.locator(inside).is_visible()
        assert [page.locator(other).is_visible() for other in ("#temperature", "#tiles", "#prompt")].count(True) == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_live_view_follows_load(open_page, server):
    page = open_page(server.url)
    fields = {"model": "apportion", "prompt": "The", "max_tokens": 600, "ignore_eos": True}
    seen = threading.Event()

    def load():
        while not seen.is_set():  # a fast machine would be done before the page looks
            server.post("/v1/completions", json=fields)

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        wait_until(page, "Number(document.querySelectorAll('.tile b')[3].textContent) > 0")
        wait_until(page, "Number(document.querySelectorAll('.tile b')[0].textContent.replace(',', '')) > 0")
        page.wait_for_selector(".bar .owner-0")
    finally:
        seen.set()
        for thread in threads:
            thread.join()
    assert "free" in page.locator("#kv").inner_text() and "main" in page.locator("#lanes").inner_text()
    assert page.locator("#tiles path.line").count() >= 3


def test_files_are_closed_to_the_outside(server):
    answer = server.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    names = set(re.findall(r'(?:src|href)="(dashboard/[^"]+)"', answer.text))
    assert len(names) >= 4 and not re.search(r'(?:src|href)="(?!dashboard/|#)', answer.text)
    for name in names:
        assert server.get(f"/{name}").headers["x-content-type-options"] == "nosniff"
    again = server.get("/", headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    for path in ("/dashboard/none.js", "/dashboard/../routes.py", "/dashboard/%2e%2e%2froutes.py"):
        assert httpx.get(server.url + path).status_code == 404
