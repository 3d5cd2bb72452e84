"""The web page in a real browser: a document dropped, watched, asked, switched, deleted; by keyboard alone too."""

import os
import shutil
import time
from pathlib import Path

import pytest

from server_live import BOOK, live, live_model, wait_until

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no browser is installed (apt-get install chromium)")
WRITTEN = "() => document.querySelector('.assistant .words').textContent.length"
PICTURES = os.environ.get("BEACON_TEST_PICTURES")  # a folder to keep screenshots in


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server(tmp_path):
    with live(tmp_path / "contexts", model=live_model(), max_tokens=40) as running:
        yield running


@pytest.fixture
def page(browser, server):
    page = browser.new_page(viewport={"width": 1180, "height": 760})
    mistakes = []
    page.on("pageerror", lambda error: mistakes.append(str(error)))
    page.on("console", lambda message: message.type == "error" and mistakes.append(message.text))
    page.set_default_timeout(30_000)
    page.goto(server.url)
    page.get_by_text("tiny · chunks of 32 tokens").wait_for()
    yield page
    page.close()
    assert not mistakes


def picture(page, name):
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / f"{name}.png")


@needs_browser
def test_a_document_is_dropped_compressed_and_asked(page, server):
    page.evaluate(
        """(text) => {
            const data = new DataTransfer();
            data.items.add(new File([text], "lions.txt", { type: "text/plain" }));
            document.dispatchEvent(new DragEvent("dragover", { dataTransfer: data, bubbles: true, cancelable: true }));
            document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        BOOK,
    )
    page.locator("#title", has_text="lions.txt").wait_for()
    (context,) = server.http.get("/v1/contexts").json()["data"]
    numbers = page.locator("#numbers").inner_text()
    assert f"{context['tokens']:,}" in numbers
    assert f"{context['uncompressed_bytes'] / context['cache_bytes']:.1f}×" in numbers
    picture(page, "compressed")

    page.get_by_label("Your question").fill("Who said nothing?")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("not read again").last.wait_for()
    answer = page.locator(".assistant .words").inner_text()
    assert answer.strip()
    assert "40 tokens" in page.locator(".assistant .quiet").inner_text()
    picture(page, "answered")


@needs_browser
def test_progress_is_shown_and_can_be_cancelled(page, server, monkeypatch):
    import threading

    go, step = threading.Event(), server.server.engine.step

    def held():
        if any(task.reading.num_done == 3 for task in server.server.engine._tasks):
            go.wait(30)
        step()

    monkeypatch.setattr(server.server.engine, "step", held)
    page.get_by_label("Text to compress").fill(BOOK)
    page.get_by_role("button", name="Compress").click()
    page.get_by_text("3 of 17 chunks").wait_for()
    assert 0.1 < page.get_by_role("progressbar").evaluate("bar => bar.value") < 0.3
    picture(page, "compressing")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled.").wait_for()
    go.set()
    wait_until(lambda: server.server.engine.num_running == 0)
    assert server.http.get("/v1/contexts").json()["data"] == []


@pytest.fixture
def held_back(server, monkeypatch):
    """Holds the reading of a long text at its third chunk until the event is set; answers go on."""
    import threading

    engine = server.server.engine
    go, read = threading.Event(), engine._read_piece

    def picked():
        ready = [task for task in engine._tasks if go.is_set() or task.reading.num_done != 3]
        return min(ready, key=lambda task: task.reading.num_left) if ready else None

    def reading(task):
        if task is None:
            time.sleep(0.01)
            engine._debt = 0.01  # as if a chunk had been read: answers get as much time
        else:
            read(task)

    monkeypatch.setattr(engine, "_pick", picked)
    monkeypatch.setattr(engine, "_read_piece", reading)
    yield go
    go.set()


@needs_browser
def test_what_is_typed_while_a_text_is_compressed_stays(page, server, held_back):
    page.get_by_label("Text to compress").fill(BOOK)
    page.get_by_role("button", name="Compress").click()
    page.get_by_text("3 of 17 chunks").wait_for()
    page.get_by_label("Text to compress").fill("The next text.")
    page.get_by_label("Your question").fill("Who?")
    held_back.set()
    page.locator("#title", has_text="The lion said nothing").wait_for()
    assert page.get_by_label("Text to compress").input_value() == "The next text."
    assert page.get_by_label("Your question").input_value() == "Who?"


@needs_browser
def test_a_text_that_was_sent_is_cleared_when_it_has_been_compressed(page, server):
    page.get_by_label("Text to compress").fill(BOOK)
    page.get_by_role("button", name="Compress").click()
    page.locator("#title", has_text="The lion said nothing").wait_for()
    assert page.get_by_label("Text to compress").input_value() == ""


@needs_browser
def test_a_file_that_is_chosen_while_another_is_compressed_stays_chosen(page, server, held_back):
    def choose(name):
        page.locator("#file").set_input_files([{"name": name, "mimeType": "text/plain", "buffer": BOOK.encode()}])

    choose("one.txt")
    page.get_by_role("button", name="Compress").click()
    page.get_by_text("3 of 17 chunks").wait_for()
    choose("two.txt")
    held_back.set()
    page.locator("#title", has_text="one.txt").wait_for()
    assert page.locator("#chosen").inner_text().startswith("two.txt")


@needs_browser
def test_an_answer_goes_on_when_a_text_has_been_compressed_meanwhile(page, server, held_back):
    server.server.settings.__dict__["max_tokens"] = 900
    page.get_by_label("Text to compress").fill(BOOK)
    page.get_by_role("button", name="Compress").click()
    page.get_by_text("3 of 17 chunks").wait_for()
    page.get_by_label("Your question").fill("Just chat")
    page.keyboard.press("Enter")
    page.wait_for_function(f"{WRITTEN} > 3")
    held_back.set()
    page.locator("#contexts", has_text="The lion said nothing").wait_for()
    written = page.evaluate(WRITTEN)
    page.wait_for_function(f"{WRITTEN} > {written}")
    assert page.locator("#title").inner_text() == "No context"
    page.keyboard.press("Escape")


@needs_browser
def test_a_context_that_is_chosen_while_another_is_made_stays_chosen(page, server, held_back):
    server.create("A short one.", name="chosen one")
    page.reload()
    page.get_by_label("Text to compress").fill(BOOK)
    page.get_by_role("button", name="Compress").click()
    page.get_by_text("3 of 17 chunks").wait_for()
    page.get_by_text("chosen one").click()
    held_back.set()
    page.locator("#contexts", has_text="The lion said nothing").wait_for()
    assert page.locator("#title").inner_text() == "chosen one"


@needs_browser
def test_a_file_of_a_long_name_is_taken(page, server):
    name = "n" * 300 + ".txt"
    page.locator("#file").set_input_files([{"name": name, "mimeType": "text/plain", "buffer": BOOK.encode()}])
    page.get_by_role("button", name="Compress").click()
    page.locator("#title", has_text="n" * 200).wait_for()
    assert [each["name"] for each in server.http.get("/v1/contexts").json()["data"]] == ["n" * 200]


@needs_browser
def test_everything_works_by_keyboard(page, server):
    one, two = server.create(BOOK, name="first book"), server.create(BOOK[::-1], name="second book")
    page.reload()
    page.get_by_text("first book").wait_for()
    keys = page.keyboard

    def go_to(name):
        for _ in range(40):
            keys.press("Tab")
            focused = "document.activeElement.getAttribute('aria-label') || document.activeElement.innerText"
            if (page.evaluate(focused) or "").startswith(name):
                return
        raise AssertionError(f"{name} cannot be reached by Tab")

    go_to("first book")
    keys.press("Enter")
    assert page.evaluate("document.activeElement.id") == "question"
    keys.type("Who?")
    keys.press("Shift+Enter")
    keys.type("Really?")
    keys.press("Enter")
    page.get_by_text("not read again").last.wait_for()
    assert page.locator(".user .words").inner_text() == "Who?\nReally?"
    assert page.locator("#title").inner_text() == "first book"

    page.on("dialog", lambda dialog: dialog.accept())
    page.evaluate("document.activeElement.blur()")
    go_to("Delete second book")
    keys.press("Enter")
    page.get_by_text("second book").wait_for(state="detached")
    assert [each["id"] for each in server.http.get("/v1/contexts").json()["data"]] == [one["id"]] != [two["id"]]


@needs_browser
def test_switching_keeps_conversations_apart_and_an_answer_can_be_stopped(page, server):
    server.server.settings.__dict__["max_tokens"] = 900
    server.create(BOOK, name="first book")
    page.reload()
    page.get_by_label("Your question").fill("Just chat")
    page.keyboard.press("Enter")
    page.wait_for_function(f"{WRITTEN} > 3")
    page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for()
    wait_until(lambda: server.server.engine.num_running == 0)
    page.get_by_text("first book").click()
    assert page.locator(".turn").count() == 0
    page.get_by_role("button", name="No context").click()
    assert page.locator(".turn").count() == 2


@needs_browser
def test_a_question_asked_before_the_page_is_ready_is_answered_where_it_is_seen(page, server):
    page.route("**/v1/models", lambda route: (time.sleep(0.3), route.continue_()))
    page.route("**/v1/contexts", lambda route: (time.sleep(0.3), route.continue_()))
    page.reload(wait_until="commit")
    page.get_by_label("Your question").fill("Who?")
    page.keyboard.press("Enter")
    page.get_by_text("40 tokens").wait_for()
    assert page.locator(".assistant .words").inner_text().strip()


@needs_browser
def test_an_answer_is_written_on_when_another_context_is_deleted_meanwhile(page, server):
    server.server.settings.__dict__["max_tokens"] = 900
    other = server.create(BOOK, name="other book")
    page.on("dialog", lambda dialog: dialog.accept())
    page.reload()
    page.get_by_text("other book").wait_for()
    page.get_by_label("Your question").fill("Just chat")
    page.keyboard.press("Enter")
    page.wait_for_function(f"{WRITTEN} > 3")
    page.get_by_label("Delete other book").click()
    page.get_by_text("other book").wait_for(state="detached")
    written = page.evaluate(WRITTEN)
    page.wait_for_function(f"{WRITTEN} > {written}")
    page.keyboard.press("Escape")
    assert server.http.get(f"/v1/contexts/{other['id']}").status_code == 404


@needs_browser
def test_texts_are_shown_as_text_and_errors_in_words(page, server):
    server.create(BOOK, name="<img src=x onerror=alert(1)>")
    page.reload()
    page.get_by_text("<img src=x onerror=alert(1)>").first.wait_for()
    assert page.locator("aside img").count() == 0
    page.get_by_role("button", name="Compress").click()
    page.get_by_text("Drop a file or paste a text first.").wait_for()


@needs_browser
def test_a_key_is_asked_for_when_the_server_wants_one(browser, tmp_path):
    with live(tmp_path / "contexts", model=live_model(), api_key="sesame") as server:
        page = browser.new_page(viewport={"width": 420, "height": 800}, color_scheme="dark")
        page.goto(server.url)
        page.get_by_label("Key").fill("sesame")
        page.get_by_role("button", name="Enter").click()
        page.get_by_text("tiny · chunks of 32 tokens").wait_for()
        picture(page, "narrow-and-dark")
        page.close()
