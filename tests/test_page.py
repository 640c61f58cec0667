"""The page in a real browser, with a camera that is a file; skipped where there is no browser."""

import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from .serving import PICTURE, serving, until

FOUND = [shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome")]
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
BROWSER = next((path for path in [*FOUND, str(MAC)] if path and os.path.exists(path)), None)
if BROWSER is None or importlib.util.find_spec("playwright") is None:
    pytest.skip("needs playwright and chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def served():
    with serving(context=200_000) as served:
        yield served


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from playwright.sync_api import sync_playwright

    film = tmp_path_factory.mktemp("camera") / "film.mjpeg"
    with Image.open(PICTURE) as picture:
        frame = picture.convert("RGB").resize((640, 480))
    for n in range(3):
        frame.save(film.with_name(f"{n}.jpg"))
    film.write_bytes(film.with_name("0.jpg").read_bytes() * 30)
    flags = [
        "--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-video-capture={film}",
    ]  # fmt: skip
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, served):
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    context.grant_permissions(["camera"])
    page = context.new_page()
    page.set_default_timeout(20_000)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if is_problem(said) else None)
    page.goto(served.url)
    page.locator("#model", has_text="demo").wait_for()
    yield page
    context.close()
    assert problems == []


def is_problem(said):
    """Whether the console tells more than that a server refuses something."""
    return said.type == "error" and "Failed to load resource" not in said.text


def shoot(page, name):
    """Keeps a screenshot where somebody wants to look at it."""
    if "SCREENSHOTS" in os.environ:
        page.screenshot(path=f"{os.environ['SCREENSHOTS']}/{name}.png")


def ask(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.locator("#send").wait_for()
    page.locator(".turn.assistant .about", has_text="written").last.wait_for()


class TestPage:
    def test_ask_and_reload(self, page):
        page.set_input_files("#files", PICTURE)
        page.fill("#text", "What is in this image?")
        page.locator("#cost", has_text="99 tokens, 76 of pictures").wait_for()
        ask(page, "What is in this image?")
        answer = page.locator(".turn.assistant .text").inner_text()
        assert answer == "a word, a green cross and a yellow square"
        about = page.locator(".turn.assistant .about").inner_text()
        assert re.search(r"99 tokens read.*; 11 written in [\d.]+ s", about)
        ask(page, "What colour is the cross?")
        shoot(page, "two-turns")
        page.reload()
        page.locator(".turn.assistant").nth(1).wait_for()
        assert page.locator(".turn").count() == 4
        assert page.locator(".turn.assistant .text").first.inner_text() == answer
        image = page.locator(".turn.user img")
        with Image.open(PICTURE) as picture:
            width = picture.width
        until(lambda: image.evaluate("image => image.naturalWidth") == width)
        assert page.locator("#history li").count() == 1
        page.keyboard.press("Alt+n")
        assert page.locator(".turn").count() == 0
        page.locator("#history button").first.click()
        assert page.locator(".turn").count() == 4
        page.locator("#history li button").nth(1).click()
        page.locator("#history li").wait_for(state="detached")
        assert page.locator(".turn").count() == 0

    def test_boxes_while_they_come(self, page, tmp_path):
        picture = Image.new("RGB", (320, 240), (240, 240, 235))
        picture.paste((230, 200, 30), (20, 30, 90, 100))
        picture.paste((30, 90, 220), (200, 120, 280, 200))
        picture.save(tmp_path / "squares.png")
        page.set_input_files("#files", tmp_path / "squares.png")
        page.check("#find")
        page.evaluate("""() => {
            window.counts = [];
            new MutationObserver(() => {
              const about = document.querySelector('.turn.assistant .about')?.textContent ?? '';
              const boxes = document.querySelectorAll('.box').length;
              window.counts.push([boxes, about.includes('written')]);
            }).observe(document.querySelector('#turns'), {childList: true, subtree: true});
        }""")
        ask(page, "square")
        counts = page.evaluate("window.counts")
        assert page.locator(".box").count() == 2
        assert {boxes for boxes, ended in counts if not ended} == {0, 1, 2}
        places = page.evaluate("""() => [...document.querySelectorAll('.box')].map(box => {
            const a = box.getBoundingClientRect(), b = box.parentElement.getBoundingClientRect();
            return [(a.left - b.left) / b.width, (a.top - b.top) / b.height,
                    (a.right - b.left) / b.width, (a.bottom - b.top) / b.height];
        })""")
        for place, right in zip(places, ((20, 30, 90, 100), (200, 120, 280, 200)), strict=True):
            for value, pixels, side in zip(place, right, (320, 240) * 2, strict=True):
                assert abs(value - pixels / side) < 0.05
        shoot(page, "boxes")

    def test_stop(self, page, served):
        page.click("#more")
        page.fill("#max_tokens", "100000")
        page.fill("#schema", '{"type": "array", "items": {"type": "integer"}, "minItems": 9999}')
        page.fill("#text", "Count")
        page.press("#text", "Enter")
        page.locator(".turn.assistant .text", has_text="[").wait_for()
        page.keyboard.press("Escape")
        page.locator(".turn.assistant .about", has_text="stopped").wait_for()
        until(lambda: not served.service.answers)

    def test_a_schema(self, page):
        page.click("#more")
        page.fill("#schema", "{broken")
        page.fill("#text", "Is it green?")
        page.press("#text", "Enter")
        assert "no JSON" in page.locator("#wrong").inner_text()
        assert page.locator(".turn").count() == 0
        page.fill("#schema", '{"enum": ["yes", "no"]}')
        ask(page, "Is it green?")
        assert page.locator(".turn.assistant .text").inner_text() in ('"yes"', '"no"')
        shoot(page, "settings")

    def test_camera(self, page):
        page.click("#camera")
        until(lambda: page.evaluate("document.querySelector('#video').videoWidth") > 0)
        shoot(page, "camera")
        page.click("#shot-yes")
        page.locator("#draft img").wait_for()
        assert page.evaluate("document.querySelector('#video').srcObject") is None
        ask(page, "What is in this image?")
        assert page.locator(".turn.user img").evaluate("i => i.naturalWidth") == 640

    def test_drop_and_paste(self, page):
        page.evaluate("""async () => {
            const picture = await new Promise(done => {
              const canvas = document.createElement('canvas');
              canvas.width = canvas.height = 40;
              canvas.toBlob(done);
            });
            const data = new DataTransfer();
            data.items.add(new File([picture], 'a.png', {type: 'image/png'}));
            data.items.add(new File(['text'], 'a.txt', {type: 'text/plain'}));
            const values = {bubbles: true, cancelable: true};
            document.body.dispatchEvent(new DragEvent('drop', {...values, dataTransfer: data}));
            const pasted = new ClipboardEvent('paste', {...values, clipboardData: data});
            document.body.dispatchEvent(pasted);
        }""")  # fmt: skip
        page.locator("#draft img").nth(1).wait_for()
        page.locator("#draft button").first.click()
        assert page.locator("#draft img").count() == 1

    def test_errors_are_told(self, page, served, monkeypatch):
        page.click("#more")
        page.fill("#temperature", "-1")
        page.fill("#text", "Hello")
        page.press("#text", "Enter")
        page.locator(".turn .error", has_text="temperature is -1").wait_for()
        page.fill("#temperature", "")
        page.route("**/chat/completions", lambda route: route.abort())
        page.fill("#text", "Hello")
        page.press("#text", "Enter")
        page.locator(".turn .error", has_text="Failed to fetch").wait_for()
        page.unroute("**/chat/completions")
        page.locator(".turn button", has_text="Again").click()
        page.locator(".turn .about", has_text="written").wait_for()

    def test_keyboard_alone(self, page):
        page.click("h1")
        seen = []
        for _ in range(9):
            page.keyboard.press("Tab")
            seen.append(page.evaluate("document.activeElement.id"))
        for name in ("new", "choose", "camera", "text", "send", "find", "more"):
            assert name in seen

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [360, 1100])
    def test_looks(self, page, scheme, width):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 740})
        page.set_input_files("#files", PICTURE)
        page.check("#find")
        ask(page, "yellow square")
        page.uncheck("#find")
        ask(page, "What is in this image, and a long word: " + "x" * 80)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", back)[0]) < 100) == (scheme == "dark")
        page.evaluate("document.querySelector('main').scrollTop = 0")
        shoot(page, f"{scheme}-{width}")
        if width == 360:
            page.click("#menu")
            assert page.locator("#history li").count() == 1
            shoot(page, f"{scheme}-menu")


def test_a_key_is_asked_for(browser):
    with serving(api_key="secret") as served:
        page = browser.new_page()
        page.goto(served.url)
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        page.locator("#model", has_text="demo").wait_for()
        page.close()
