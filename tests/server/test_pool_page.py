"""The page of the pool in headless Chromium: live, replayed, by pointer and by keyboard."""

import json
import shutil
import threading
import time

import httpx
import numpy as np
import pytest
from running import served

from paged_kv import ArgumentError, PagedKVCache
from paged_kv.commands import cli
from paged_kv.server.pool import page, read_recording

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    """A page whose errors fail the test, and that may fetch from 127.0.0.1 only."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    tab, faults = context.new_page(), []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on(
        "console",
        lambda message: message.type == "error" and "401" not in message.text and faults.append(message.text),
    )
    tab.on("request", lambda request: faults.append(request.url) if "127.0.0.1" not in request.url else None)
    yield tab
    context.close()
    assert faults == []


#: Of the moment that has most pages in use.
COUNT_COLOURS = """(() => {
  const used = frames.map((frame) => frame.stats.used);
  stopReplay(); at = used.indexOf(Math.max(...used)); draw();
  const canvas = document.getElementById("pages"), found = new Set();
  const bytes = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  for (let i = 0; i < bytes.length; i += 4)
    if (bytes[i + 3] === 255) found.add((bytes[i] << 16) | (bytes[i + 1] << 8) | bytes[i + 2]);
  return found.size;
})()"""


def feed(cache, seq, count, start=0):
    k = np.zeros((count, 1, 8), np.float32)
    with cache.step([seq], [[start + i for i in range(count)]]) as step:
        step.write(0, k, k)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A file with shared, kept, pinned and open pages."""
    path = tmp_path_factory.mktemp("recording") / "pool.jsonl"
    with PagedKVCache(1, 1, 8, num_pages=60, page_size=16, max_sequences=8) as cache:
        with cache.record(path, every=0.01):
            seqs = []
            for i in range(5):
                seqs.append(cache.sequence([*range(40), 999]))
                feed(cache, seqs[i], 40 - len(seqs[i]) or 1, len(seqs[i]))
                feed(cache, seqs[i], 30, 100 * i)
                time.sleep(0.03)
            seqs[0].free()
            pin = cache.pin(cache.match([*range(40), 999]))
            with cache.step([seqs[1]], [20]) as step:
                time.sleep(0.05)
                step.rollback()
        pin.release()
    return path


LONG = {"prompt": "x" * 200, "max_tokens": 1500, "ignore_eos": True}
IS_SAME = """(() => {
  let state = null;
  return frames.every((frame, i) => {
    state = apply(state, frame); shown = null;
    return JSON.stringify([...stateAt(i).state]) === JSON.stringify([...state.state]);
  });
})()"""


def about(tab):
    return tab.locator("#about").text_content()


def wait_until(tab, condition):
    tab.wait_for_function(condition, timeout=60000)


def test_the_live_page_follows_the_pool(tab):
    with served() as running:
        answer = httpx.get(running.url)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        tab.goto(running.url)
        wait_until(tab, "() => Number(document.body.dataset.frames) > 2")
        is_seen = threading.Event()

        def complete():  # until the page has shown it, on a busy machine too
            while not is_seen.is_set():
                httpx.post(f"{running.url}/v1/completions", json=LONG, timeout=60)

        thread = threading.Thread(target=complete)
        thread.start()
        wait_until(tab, "() => [...now.seqs.values()].some((seq) => seq.length > 300)")
        box = tab.locator("#pages").bounding_box()
        tab.mouse.move(box["x"] + 3, box["y"] + 3)
        wait_until(tab, "() => document.getElementById('about').textContent.includes('owned')")
        assert "tokens 0 to 15" in about(tab)
        is_seen.set()
        thread.join()
        wait_until(tab, "() => now.stats.used === 0")
        assert tab.evaluate("series.some((point) => point.tokens_per_s > 0 && point.running === 1)")
        tab.locator("#time").fill("1")
        wait_until(tab, "() => document.body.dataset.shown === '1'")
        assert tab.locator("#play").text_content() == "Go on"
        tab.goto("about:blank")
        deadline = time.monotonic() + 10
        while running.server.server_state.tasks and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not running.server.server_state.tasks  # without a viewer no frame is made


def test_a_key_is_prompted_for(tab):
    with served(api_keys=["secret"]) as running:
        assert httpx.get(f"{running.url}/pool/frames").status_code == 401
        tab.on("dialog", lambda dialog: dialog.accept("secret"))
        with tab.expect_response(lambda answer: answer.status == 401):
            tab.goto(running.url)
        wait_until(tab, "() => Number(document.body.dataset.frames) > 1")


def test_a_recording_is_replayed_from_one_file(tab, recording, tmp_path):
    out = tmp_path / "pool.html"
    assert cli.main(["replay", str(recording), "--out", str(out)]) == 0
    with served() as running:  # so that the page has an origin on 127.0.0.1
        html = out.read_text()
        tab.route(f"{running.url}/", lambda route: route.fulfill(body=html, content_type="text/html"))
        tab.goto(running.url)
        wait_until(tab, "() => Number(document.body.dataset.shown) === frames.length - 1")
    frames = [json.loads(line) for line in recording.read_text().splitlines()]
    assert tab.evaluate("frames.length") == len(frames)
    states = set(tab.evaluate("frames.flatMap((_, i) => [...stateAt(i).state])"))
    assert {0, 1, 2, 2 | 4, 2 | 8} <= states
    # A state is the same whether it is reached forwards or looked up.
    assert tab.evaluate(IS_SAME)


def test_the_keyboard_moves_over_pages(tab, recording):
    tab.set_content(page(read_recording(recording)))
    wait_until(tab, "() => document.body.dataset.shown === String(frames.length - 1)")
    tab.locator("#pages").focus()
    tab.keyboard.press("ArrowRight")
    wait_until(tab, "() => document.getElementById('about').textContent.startsWith('page 0')")
    tab.keyboard.press("ArrowRight")
    wait_until(tab, "() => document.getElementById('about').textContent.startsWith('page 1')")
    tab.keyboard.press("Escape")
    wait_until(tab, "() => document.getElementById('about').textContent === 'Point at a page.'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_are_drawn_and_differ_from_the_ground(tab, recording, scheme):
    tab.emulate_media(color_scheme=scheme)
    tab.set_content(page(read_recording(recording)))
    wait_until(tab, "() => document.body.dataset.shown === String(frames.length - 1)")
    colours = tab.evaluate(COUNT_COLOURS)
    assert colours >= 5


def test_a_hundred_thousand_pages_are_drawn_in_time(tab, tmp_path):
    """One square a page, at least a pixel wide."""
    path = tmp_path / "pool.jsonl"
    pages = [value for i in range(100_000) for value in (i, 2, 1 + i % 3, i % 50, i - 1 if i % 100 else -1)]
    seqs = [[row, row + 1, 2000 * 16, list(range(row, 100_000, 50))] for row in range(50)]
    stats = {
        "used": 100_000,
        "kept": 0,
        "free": 0,
        "tokens": 10**6,
        "sequences": 50,
        "queried": 0,
        "hits": 0,
        "evictions": 0,
    }
    frame = {
        "t": 0,
        "kind": "full",
        "page_size": 16,
        "num_pages": 100_000,
        "pages": pages,
        "seqs": seqs,
        "gone": [],
        "stats": stats,
    }
    path.write_text(json.dumps(frame) + "\n")
    tab.set_content(page(read_recording(path)))
    wait_until(tab, "() => document.body.dataset.frames === '1'")
    elapsed = tab.evaluate(
        "(() => { const begin = performance.now(); cursor = 7; draw(); return performance.now() - begin; })()"
    )
    assert elapsed < 2000
    assert "page 7" in about(tab)


# ---- without a browser


def test_a_cut_off_last_line_is_left_out(recording, tmp_path):
    path = tmp_path / "cut.jsonl"
    text = recording.read_text()
    path.write_text(text + text.splitlines()[0][:40])
    assert read_recording(path).splitlines() == text.splitlines()


@pytest.mark.parametrize("content", ["", "x\n", "{}\n", '[1]\n{"t": 1}\n'])
def test_what_is_no_recording_is_refused(content, tmp_path, capsys):
    path = tmp_path / "other"
    path.write_text(content)
    with pytest.raises(ArgumentError, match=r"cache\.record"):
        read_recording(path)
    assert cli.main(["replay", str(path), "--out", str(tmp_path / "out.html")]) == 2
    assert "cache.record" in capsys.readouterr().err and not (tmp_path / "out.html").exists()


def test_a_recording_ends_no_element_of_the_page(recording):
    html = page('{"t": "</script><script>alert(1)</script>"}')
    assert html.count("</script>") == page("").count("</script>")


def test_a_replay_is_served_without_a_model(recording):
    from functools import partial
    from http.server import ThreadingHTTPServer

    from paged_kv.commands.replay import _Page

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Page, page().encode())) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert "<h1>The pool</h1>" in httpx.get(url).text
        assert httpx.get(f"{url}/other").status_code == 404
        server.shutdown()
        thread.join()
