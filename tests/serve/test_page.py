"""The page at `/`, driven in a real headless Chromium: what a user sees, on what the server says."""

from __future__ import annotations

import json
import random
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright
from starlette.responses import JSONResponse

from tests.support.scripted_server import DONE, ScriptedServer, answer, chunk, event, refusal
from tests.support.serving import loader, serving
from tests.support.tiny_folder import make_folder, tiny_environment

CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
IPAD = {"viewport": {"width": 820, "height": 1180}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")


def node(text: str, parent: int, state: str, confidence: float = 0.5, source: str = "model") -> dict[str, Any]:
    return {"id": 7, "text": text, "parent": parent, "confidence": confidence, "source": source, "state": state}


def tree_round(index: int, nodes: Sequence[dict[str, Any]], bonus: str, **figures: Any) -> dict[str, Any]:
    known = {"tokens_per_s": 12.34, "tokens_per_pass": 2.5, "peak_rss_bytes": 312_000_000, "budget_bytes": 10**9}
    return {"index": index, "nodes": list(nodes), "bonus": {"id": 9, "text": bonus}, **known, **figures}


ROUND_1 = tree_round(
    0,
    [
        node("\n", -1, "root", 1.0, "target"),
        node(" rain", 0, "rejected", 0.25),
        node("Soft", 0, "accepted", 0.61),
        node(" grey", 2, "accepted", 0.5, "ngram"),
        node(" morning", 3, "rejected", 0.3),
        node(" sky", 3, "provisional", 0.12),
    ],
    " cloud",
)
ROUND_2 = tree_round(1, [node(" cloud", -1, "root"), node("s", 0, "accepted", 0.9)], ".", tokens_per_s=23.45)
FIGURES = {"tokens_per_s": 20.0, "tokens_per_pass": 2.5, "acceptance_rate": 0.75, "peak_rss_bytes": 320_000_000}
FIRST = chunk([("Soft", True), (" grey", True), (" cloud", False)], ROUND_1)
SECOND = chunk([("s", True), (".", False)], ROUND_2, "stop")
USAGE = event(
    {"choices": [], "usage": {"completion_tokens": 5, "speculation": {**FIGURES, "budget_bytes": 640_000_000}}}
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer([[FIRST, SECOND, USAGE, DONE]]).running() as scripted:
        yield scripted


@dataclass
class Visitor:
    """Opens pages and notes what no page may do: errors, broken policies, requests elsewhere."""

    browser: Browser
    problems: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)

    def open(self, url: str, **options: Any) -> Page:
        context = self.browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(10_000)
        context.on("request", lambda request: self.addresses.append(request.url))
        page = context.new_page()
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._heard)
        page.goto(url)
        return page

    def _heard(self, message: ConsoleMessage) -> None:
        # A refused request is logged by the browser itself.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.problems.append(message.text)


@pytest.fixture
def visitor(browser: Browser) -> Iterator[Visitor]:
    visitor = Visitor(browser)
    yield visitor
    for context in browser.contexts:
        context.close()
    assert visitor.problems == []
    assert visitor.addresses
    assert [address for address in visitor.addresses if not address.startswith("http://127.0.0.1:")] == []


@pytest.fixture
def page(visitor: Visitor, server: ScriptedServer) -> Page:
    return visitor.open(server.url)


def say(page: Page, text: str = "Hello") -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def finished(page: Page, count: int = 1) -> None:
    expect(page.locator('.answer[aria-busy="false"]')).to_have_count(count)


def ask(page: Page, text: str = "Hello", count: int = 1) -> None:
    """Ask, and wait for the answer, which is number `count`."""
    say(page, text)
    finished(page, count)


def texts(page: Page, selector: str) -> list[str]:
    return page.locator(selector).all_text_contents()


def background(page: Page, selector: str) -> str:
    return str(page.eval_on_selector(selector, "e => getComputedStyle(e).backgroundColor"))


def test_a_question_before_the_servers_name_is_known_names_no_model(
    visitor: Visitor, server: ScriptedServer
) -> None:
    server.models = JSONResponse({"object": "list", "data": []})
    ask(visitor.open(server.url))
    assert "model" not in server.requests[0]


def test_an_answer_streams_in_with_tinted_tokens_and_live_figures(page: Page, server: ScriptedServer) -> None:
    gate = threading.Event()
    server.scripts = [[FIRST, gate, SECOND, USAGE, DONE]]
    expect(page.locator("#model")).to_have_text("tiny · draft tinier")  # known before it is asked
    say(page, "A line on clouds")
    expect(page.locator(".question")).to_have_text("A line on clouds")
    expect(page.locator(".answer .text")).to_have_text("Soft grey cloud")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_hidden()
    expect(page.locator("#speed")).to_have_text("12.3")
    expect(page.locator("#per-pass")).to_have_text("2.50")
    expect(page.locator("#acceptance")).to_have_text("67 %")  # 2 of 3: a tested child of the path's end was wrong
    expect(page.locator("dd", has=page.locator("#memory"))).to_have_text("312 MB of 1.00 GB")
    gate.set()
    expect(page.locator(".answer .text")).to_have_text("Soft grey clouds.")
    finished(page)
    assert texts(page, ".token.drafted") == ["Soft", " grey", "s"]
    assert texts(page, ".token:not(.drafted)") == [" cloud", "."]
    expect(page.locator(".state")).to_have_text("5 tokens · 20.0 tokens/s · 2.50 per pass · 75 % accepted")
    expect(page.locator("#speed")).to_have_text("20.0")
    expect(page.locator("#acceptance")).to_have_text("75 %")
    expect(page.locator("dd", has=page.locator("#memory"))).to_have_text("320 MB of 640 MB")
    share = "e => e.getBoundingClientRect().width / e.parentElement.getBoundingClientRect().width"
    assert page.eval_on_selector("#budget-used", share) == pytest.approx(0.5, abs=0.02)
    sent = server.requests[0]
    assert sent["messages"] == [{"role": "user", "content": "A line on clouds"}]
    assert (sent["model"], sent["stream"]) == ("tiny", True)
    assert sent["speculation"] == {"tokens": True, "trees": True}
    clear, tint = background(page, ".token:not(.drafted)"), page.get_by_role("button", name="Tint")
    for pressed in ("true", "false"):
        expect(tint).to_have_attribute("aria-pressed", pressed)
        assert (background(page, ".token.drafted") != clear) == (pressed == "true")
        tint.click()


def test_rounds_and_figures_that_are_none_are_left_out(page: Page, server: ScriptedServer) -> None:
    odd = [{"nodes": []}, {"nodes": "x"}, {}, tree_round(0, [node("a", 0, "root")], "b"), None]
    lone = tree_round(0, [node("a", -1, "root")], "b", budget_bytes=None)
    usage = {"completion_tokens": 1, "speculation": {"tested": 0, "acceptance_rate": 0.0, "budget_bytes": None}}
    chunks = [chunk([("ok ", False)], round) for round in [*odd, lone]]
    server.scripts = [[*chunks, event({"choices": [], "usage": usage}), DONE]]
    ask(page)
    expect(page.locator(".answer .text")).to_have_text("ok ok ok ok ok ok")
    expect(page.locator("#place")).to_have_text("round 1 of 1")
    expect(page.locator(".state")).not_to_contain_text("accepted")
    expect(page.locator("dd", has=page.locator("#memory"))).to_have_text("312 MB")
    expect(page.locator("#budget")).to_be_hidden()
    expect(page.locator("#acceptance")).to_have_text("–")


def test_a_round_is_drawn_as_its_tree_and_each_node_tells_what_it_is(page: Page, server: ScriptedServer) -> None:
    server.scripts = [[FIRST, DONE]]
    ask(page)
    expect(page.locator("[data-node]")).to_have_count(6)
    for state, count in {"root": 1, "accepted": 2, "rejected": 2, "provisional": 1, "bonus": 1}.items():
        expect(page.locator(f".tree-node.{state}")).to_have_count(count)
        expect(page.locator(f".edge.{state}")).to_have_count(count if state != "root" else 0)
    parents = page.locator("[data-node]").evaluate_all("all => all.map(e => Number(e.dataset.parent))")
    assert parents == [n["parent"] for n in ROUND_1["nodes"]]
    assert texts(page, "[data-node] text") == ["⏎", "␣rain", "Soft", "␣grey", "␣morning", "␣sky"]
    # The accepted path and the target's own token after it are one straight line; no two nodes overlap.
    boxes = page.locator(".tree-node .body").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect()).map(({x, y, width, height}) => [x, y, width, height])"
    )
    line = [boxes[0], boxes[2], boxes[3], boxes[6]]
    assert len({box[1] for box in line}) == 1
    assert [box[0] for box in line] == sorted(box[0] for box in line)
    for a, b in combinations(boxes, 2):
        assert a[0] + a[2] < b[0] or b[0] + b[2] < a[0] or a[1] + a[3] < b[1] or b[1] + b[3] < a[1]
    told = page.locator("#node")
    expect(told).to_have_text("6 nodes: the start, 2 accepted, 2 rejected, 1 not sent")
    page.locator('[data-node="1"]').hover()
    expect(told).to_have_text("“ rain”: rejected, confidence 25 %, drafted by the draft model")
    page.locator('[data-node="0"]').focus()
    by_model = "drafted by the draft model"
    for key, text in [
        ("ArrowRight", f"“Soft”: accepted, confidence 61 %, {by_model}"),
        ("ArrowRight", "“ grey”: accepted, confidence 50 %, 31 % along its branch, drafted by prompt lookup"),
        ("ArrowRight", "“ cloud”: the target’s own token"),
        ("ArrowDown", f"“ morning”: rejected, confidence 30 %, 9 % along its branch, {by_model}"),
        ("ArrowDown", f"“ sky”: drafted, not sent, confidence 12 %, 4 % along its branch, {by_model}"),
        ("ArrowLeft", "“ grey”: accepted, confidence 50 %, 31 % along its branch, drafted by prompt lookup"),
    ]:
        page.keyboard.press(key)
        expect(told).to_have_text(text)


def test_nodes_do_not_overlap_and_edges_do_not_cross(page: Page) -> None:
    rng = random.Random(5)
    for _ in range(100):
        nodes, end = [node("r", -1, "root")], 0
        for index in range(1, rng.randint(2, 64)):
            parent = rng.choice([index - 1, rng.randrange(index)])
            accepted = parent == end and rng.random() < 0.5
            end = index if accepted else end
            state = "accepted" if accepted else "rejected"
            nodes.append(node("x" * rng.randint(0, 9), parent, state, rng.random()))
        layout = 'async (round) => (await import("/page/layout.js")).layOut(round).places'
        places = page.evaluate(layout, tree_round(0, nodes, "b"))
        spots = [(place["depth"], place["row"]) for place in places]
        assert len(set(spots)) == len(nodes) + 1
        parents = [*(n["parent"] for n in nodes), end]
        edges = [(spots[parent], spots[child]) for child, parent in enumerate(parents) if child]
        for (depth, above), (_, below) in edges:
            between = [b for (d, a), (_, b) in edges if d == depth and a < above]
            assert max(between, default=-1) < below  # parents higher up have all their children higher up
        assert {spots[index][1] for index in (0, end, len(nodes))} == {0}


def test_the_reader_steps_through_rounds_while_more_come(page: Page, server: ScriptedServer) -> None:
    gate = threading.Event()
    third = tree_round(2, [node(".", -1, "root")], " Then")
    server.scripts = [[FIRST, SECOND, gate, chunk([(" Then", False)], third), DONE]]
    say(page)
    place, earlier = page.locator("#place"), page.get_by_role("button", name="Earlier round")
    expect(place).to_have_text("round 2 of 2")
    expect(page.locator("[data-node]")).to_have_count(2)
    earlier.click()
    expect(place).to_have_text("round 1 of 2")
    expect(page.locator("[data-node]")).to_have_count(6)
    assert texts(page, ".of-round") == ["Soft", " grey", " cloud"]
    expect(earlier).to_be_disabled()
    page.get_by_label("Round", exact=True).press("ArrowRight")
    expect(place).to_have_text("round 2 of 2")
    assert texts(page, ".of-round") == ["s", "."]
    page.locator(".token", has_text="grey").click()
    expect(place).to_have_text("round 1 of 2")
    gate.set()
    finished(page)
    expect(place).to_have_text("round 1 of 3")
    expect(page.locator("[data-node]")).to_have_count(6)


def test_stop_try_again_and_new(page: Page, server: ScriptedServer) -> None:
    never = threading.Event()
    server.scripts = [[never], [FIRST, never], answer("Second."), [FIRST, never], answer("Fresh.")]
    message = page.get_by_label("Message")
    say(page, "First question")
    expect(page.locator(".state")).to_be_visible()
    page.keyboard.press("Escape")
    assert server.vanished.wait(10)
    server.vanished.clear()
    expect(message).to_have_value("First question")  # to be changed: there was no answer yet
    expect(page.locator(".question")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    message.press("Enter")
    expect(page.locator(".answer .text")).to_have_text("Soft grey cloud")
    page.get_by_role("button", name="Stop").click()
    finished(page)
    assert server.vanished.wait(10)
    server.vanished.clear()
    expect(page.locator(".state")).to_contain_text("stopped")
    expect(page.locator("#error")).to_be_hidden()
    expect(message).to_be_focused()
    ask(page, "Second question", count=2)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer .text").last).to_have_text("Soft grey cloud")
    page.get_by_role("button", name="New").click()
    assert server.vanished.wait(10)
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator(".answer")).to_have_count(0)
    expect(page.locator("[data-node]")).to_have_count(0)
    expect(page.locator("#speed")).to_have_text("–")
    ask(page, "New")
    contents = [[one["content"] for one in request["messages"]] for request in server.requests[2:]]
    assert contents == [["First question", "Soft grey cloud", "Second question"]] * 2 + [["New"]]


def test_a_reload_keeps_the_conversation_and_new_chat_can_be_undone(page: Page, server: ScriptedServer) -> None:
    never = threading.Event()
    server.scripts = [
        [FIRST, SECOND, USAGE, DONE],
        answer("**Bold** <b>"),
        [FIRST, never],
        [never],
        answer("End."),
    ]
    ask(page, "One")
    ask(page, "Two", count=2)
    shown = page.locator(".answer .text")
    for _ in range(2):
        page.reload()
        finished(page, 2)
        assert texts(page, ".question") == ["One", "Two"]
        assert texts(page, ".answer .text") == ["Soft grey clouds.", "Bold <b>"]
        assert texts(page, ".answer strong") == ["Bold"]
        assert texts(page, ".token.drafted") == ["Soft", " grey", "s"]
    expect(page.locator(".state").first).to_contain_text("5 tokens · 20.0 tokens/s")
    expect(page.get_by_role("button", name="Show trees")).to_have_count(0)  # rounds are not kept
    say(page, "Three")
    expect(shown.last).to_have_text("Soft grey cloud")
    page.reload()
    finished(page, 3)
    expect(shown.last).to_have_text("Soft grey cloud")  # as far as it had come
    expect(page.locator(".state").last).to_contain_text("cut off")
    page.get_by_role("button", name="New").click()
    expect(page.locator(".answer")).to_have_count(0)
    page.reload()
    page.get_by_role("button", name="Bring back the last chat").click()
    finished(page, 3)
    say(page, "Four")
    page.wait_for_function("() => document.querySelectorAll('.question').length === 4")
    page.reload()
    finished(page, 3)
    expect(page.get_by_label("Message")).to_have_value("Four")  # it had no answer yet
    page.get_by_label("Message").press("Enter")
    finished(page, 4)
    expect(page.get_by_role("button", name="Bring back the last chat")).to_be_hidden()
    said = [message["content"] for message in server.requests[-1]["messages"]]
    assert said == ["One", "Soft grey clouds.", "Two", "**Bold** <b>", "Three", "Soft grey cloud", "Four"]


@pytest.mark.parametrize(
    "stored", ["{", "[]", "null", '{"turns": 3}', '{"turns": [null, {"question": 1}, {"question": "x"}]}',
               '{"turns": [{"question": "x", "answer": {"text": "y", "tokens": [[null], 3], "figures": 3}}]}'],
)  # fmt: skip
def test_what_is_stored_may_be_anything(page: Page, server: ScriptedServer, stored: str) -> None:
    page.add_init_script(f"localStorage['llmcad-mlx.conversation'] = {json.dumps(stored)}")
    page.reload()
    ask(page, count=2 if "y" in stored else 1)


@pytest.mark.parametrize(
    ("settings", "sampling", "said"),
    [
        ({}, None, "the temperature is 0"),
        ({}, {"temperature": 0.7}, "the same answer again"),
        ({"temperature": 0.5, "seed": 3}, None, "the seed is fixed"),
        ({"temperature": 0}, {"temperature": 0.7}, "the temperature is 0"),
    ],
)
def test_trying_again_says_why_the_answer_is_the_same(
    visitor: Visitor,
    server: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, float],
    sampling: Any,
    said: str,
) -> None:
    server.model |= {} if sampling is None else {"sampling": sampling}
    server.scripts = [answer("Blue."), answer("Green."), answer("Green.")]
    page = visitor.open(server.url)
    page.evaluate("text => { localStorage['llmcad-mlx.settings'] = text }", json.dumps(settings))
    ask(page)
    again, state = page.get_by_role("button", name="Try again"), page.locator(".state")
    again.click()
    expect(page.locator(".answer .text")).to_have_text("Green.")
    expect(state).not_to_contain_text("same")
    again.click()
    expect(state).to_contain_text(said)
    with monkeypatch.context() as gone:
        gone.setattr(server, "scripts", [refusal(503, "Gone.")])
        again.click()
        expect(page.locator("#error")).to_have_text("Gone.")
        finished(page)
        expect(page.locator(".answer .text")).to_have_text("Green.")  # no other one came
        expect(page.get_by_label("Message")).to_have_value("")
    page.get_by_role("button", name="Settings").click()
    shown = str((sampling or {"temperature": 0})["temperature"])
    expect(page.get_by_label("Temperature")).to_have_attribute("placeholder", shown)


def test_settings_are_checked_sent_and_kept(page: Page, server: ScriptedServer) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Top p").fill("1.5")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#settings-error")).to_contain_text("Top p:")
    expect(page.get_by_label("Top p")).to_be_focused()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#settings-error")).to_be_hidden()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.8")
    page.get_by_label("Seed").fill("0")
    page.get_by_label("Policy").select_option("paper")
    page.get_by_label("Tree nodes").fill("32")
    page.get_by_role("button", name="Save").click()
    page.reload()
    ask(page)
    sent = server.requests[0]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert sent.items() >= {"temperature": 0.8, "seed": 0, "policy": "paper", "tree_nodes": 32}.items()
    assert not {"top_p", "top_k", "min_p", "max_tokens", "repetition_penalty"} & set(sent)


def test_a_key_is_asked_for_and_kept_for_the_tab(visitor: Visitor, server: ScriptedServer) -> None:
    server.key = "right-key-1"
    page = visitor.open(server.url)
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_contain_text("The API key is missing or wrong.")
    dialog.get_by_label("Key").fill("wrong-key-1")
    page.keyboard.press("Enter")
    expect(dialog.get_by_label("Key")).to_have_value("")
    dialog.get_by_label("Key").fill("right-key-1")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#model")).to_have_text("tiny · draft tinier")
    ask(page)
    page.reload()
    ask(page, count=2)
    assert page.evaluate("JSON.stringify(localStorage)").find("right-key-1") == -1
    assert page.evaluate("Object.values(sessionStorage)") == ["right-key-1"]
    server.key = "newer-key-1"
    say(page, "Still here")
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.locator("#error")).to_have_text("The API key is missing or wrong.")
    expect(page.get_by_label("Message")).to_have_value("Still here")
    page.get_by_label("Message").press("Enter")
    dialog.get_by_label("Key").fill("newer-key-1")
    dialog.get_by_role("button", name="Use key").click()
    finished(page, 3)
    assert server.requests[-1]["messages"][-1]["content"] == "Still here"
    expect(page.get_by_label("Message")).to_have_value("")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (refusal(429, "Too many\nwait.", **{"Retry-After": "3"}), "Too many wait. Try again in 3 s."),
        (refusal(503, ""), "The server answered with status 503."),
        (refusal(400, HOSTILE), HOSTILE),
        ([DONE[:8]], "The server closed the connection; the answer is cut off."),
        ([b"data: {nonsense\n\n"], "The server sent something that is not JSON; the answer is cut off."),
        ([event({"error": {"message": "The disk\nfailed."}})], "The disk failed."),
    ],
    ids=["queue full", "no message", "hostile", "closed", "no JSON", "failed in the middle"],
)
def test_an_error_is_one_line_and_the_question_comes_back(
    page: Page, server: ScriptedServer, script: Any, said: str
) -> None:
    server.scripts = [script]
    say(page, "Again?")
    expect(page.locator("#error")).to_have_text(said)
    expect(page.get_by_label("Message")).to_have_value("Again?")
    expect(page.locator(".answer")).to_have_count(0)
    server.scripts = [answer("Fine.")]
    page.get_by_label("Message").press("Enter")
    expect(page.locator("#error")).to_be_hidden()
    finished(page)
    assert page.evaluate("window.hacked") is None


def test_an_answer_that_breaks_off_is_kept(page: Page, server: ScriptedServer) -> None:
    server.scripts = [[FIRST, event({"error": {"message": "The disk failed."}})]]
    ask(page)
    expect(page.locator(".answer .text")).to_have_text("Soft grey cloud")
    expect(page.locator(".state")).to_contain_text("cut off")
    expect(page.locator("#error")).to_have_text("The disk failed.")
    page.route("**/v1/chat/completions", lambda route: route.abort())  # as if the server were gone
    say(page, "Anyone?")
    expect(page.locator("#error")).to_contain_text("cannot be reached")
    expect(page.get_by_label("Message")).to_have_value("Anyone?")


JOINED = """async () => {
  const answer = new (await import("/page/answer.js")).Answer();
  for (const delta of [{ reasoning: "a", content: "b" }, { content: "c" }, {}, { reasoning: "d" },
                       { reasoning: "e", content: "" }, { content: "f", reasoning: null }])
    answer.add({ choices: [{ delta }] });
  return answer.text;
}"""


@pytest.mark.parametrize("tokens", [True, False])
def test_thinking_is_shown_too(page: Page, server: ScriptedServer, tokens: bool) -> None:
    """The server takes it out of the text; a token has its markers still."""
    parts = [("<think>plan", "reasoning", "plan"), ("</think>\n", None, ""), ("Paris", "content", "Paris")]
    chunks = [
        event({
            "choices": [{"index": 0, "delta": {} if name is None else {name: told}, "finish_reason": None}],
            "speculation": {"tokens": [{"id": 5, "text": written, "from_draft": False}] if tokens else []},
        })
        for written, name, told in parts
    ]  # fmt: skip
    server.scripts = [[*chunks, DONE]]
    ask(page, "What is it?")
    expect(page.locator(".answer .text")).to_have_text(
        re.compile(r"<think>plan</think>\s+Paris" if tokens else "plan")
    )
    if not tokens:  # what stood between them is not told
        assert texts(page, ".answer .text p") == ["plan", "Paris"]
        assert page.evaluate(JOINED) == "a\n\nbc\n\nde\n\nf"


def test_hostile_text_is_shown_as_text(visitor: Visitor, server: ScriptedServer) -> None:
    server.model = {"id": HOSTILE, "draft": HOSTILE}
    hostile = tree_round(0, [node(HOSTILE, -1, "root"), node(HOSTILE, 0, "accepted", 0.5, HOSTILE)], HOSTILE)
    written = f"{HOSTILE}\n\n```{HOSTILE}\n{HOSTILE}\n```\n\n**{HOSTILE}**\n\n[a](javascript:alert(1))"
    server.scripts = [[chunk([(written, True)], hostile), DONE]]
    page = visitor.open(server.url)
    ask(page, HOSTILE)
    page.locator('[data-node="1"]').click()
    expect(page.locator("#node")).to_contain_text("onerror")
    expect(page.locator(".question")).to_have_text(HOSTILE)
    expect(page.locator(".answer p").first).to_have_text(HOSTILE)
    expect(page.locator(".answer pre code")).to_have_text(HOSTILE)
    expect(page.locator(".answer strong")).to_have_text(HOSTILE)
    assert page.locator("main :is(script, img, a, iframe, style)").count() == 0
    assert page.evaluate("window.hacked") is None


def test_bytes_may_be_cut_anywhere(page: Page, server: ScriptedServer) -> None:
    whole = chunk([("Grüße, 世界 ", True), ("🐻‍❄️", False)], ROUND_1) + b": still here\r\n\r\n" + DONE
    server.scripts = [[whole[at : at + 1] for at in range(len(whole))]]
    ask(page)
    expect(page.locator(".answer .text")).to_have_text("Grüße, 世界 🐻‍❄️")
    assert texts(page, ".token.drafted") == ["Grüße, 世界 "]


RENDER = """async ([source, steps]) => {
    const { Rendering } = await import("/page/markdown.js");
    const container = document.createElement("div");
    const tokens = Array.from(source, (_, at) => ({ end: at + 1, drafted: at % 3 === 0, round: at % 5 }));
    const answer = { text: "", tokens };
    const rendering = new Rendering(container, answer, { value: "" }, (change) => change());
    for (const end of steps) {
        answer.text = source.slice(0, end);
        await rendering.flush();
    }
    return [container.textContent, container.innerHTML];
}"""
PARTS = [
    "a", "B ", " c", "**", "*", "_", "`", "```py\n", "\n", "\n\n", "- ", "1. ", "> ", "# ", "  ", "~~", "\\",
    "~~~\n", "| a | b |\n", "|---|---|\n", "[x](http://y)",
]  # fmt: skip


def test_text_that_streams_ends_up_as_text_that_came_at_once(page: Page) -> None:
    """Random Markdown, a few characters at a time: same document, tints included."""
    rng = random.Random(7)
    for _ in range(12):
        source = "".join(rng.choices(PARTS, k=60))
        steps = [*sorted(rng.sample(range(len(source)), 8)), len(source)]
        streamed, at_once = page.evaluate(RENDER, [source, steps]), page.evaluate(RENDER, [source, [len(source)]])
        assert streamed == at_once, source
        assert sum(letter in "aBcxy" for letter in at_once[0]) >= sum(map(source.count, "aBcx")), source


def test_tokens_are_found_again_in_what_is_rendered(page: Page, server: ScriptedServer) -> None:
    """Markers between tokens, within and around them; code in colours; a cut emoji's neighbours."""
    pieces = [("**So", True), ("ft** \\*x", False), ("\n\n```py", True), ("thon\nprint", False), ("('👍", True),
              ("') # é\n", False), ("```\n1. ", True), ("1 [li", False), ("nk](http://so) ft", True)]  # fmt: skip
    server.scripts = [[chunk(pieces), DONE]]
    ask(page)
    assert "".join(texts(page, ".token.drafted")) == "So('👍nk ft"
    assert "".join(texts(page, ".token:not(.drafted)")) == "ft *xprint') # é1 li"
    expect(page.locator(".text pre .nb .token")).to_have_text("print")
    link = page.get_by_role("link", name="link")
    assert (link.get_attribute("href"), link.get_attribute("rel")) == ("http://so", "noopener noreferrer")


def test_without_the_renderer_text_is_plain(page: Page, server: ScriptedServer) -> None:
    page.route("**/markdown", lambda route: route.abort())
    server.scripts = [answer("**So**\n\n<b>ft")]
    ask(page)
    assert page.locator(".answer .text").text_content() == "**So**\n\n<b>ft"


def test_an_answer_is_not_rendered_at_every_token(page: Page, server: ScriptedServer) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/markdown") else None)
    server.scripts = [[chunk([(f"word {number}\n\n", False)]) for number in range(500)] + [DONE]]
    ask(page)
    expect(page.locator(".text p")).to_have_count(500)
    assert 1 <= len(asked) < 100


def luminance(colour: str) -> float:
    """WCAG's relative luminance of an "rgb(r, g, b)"."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


CODE = ("k", "s1", "mi", "c1", "nb")  # classes of Pygments


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_are_legible(visitor: Visitor, server: ScriptedServer, scheme: Any) -> None:
    code = "```py\nfor x in 'a', 1: # b\n    print(x)\n```\n\n"
    server.scripts = [[FIRST, chunk([(f"\n\n{code}", True)], ROUND_2), USAGE, DONE]]
    page = visitor.open(server.url, color_scheme=scheme)
    ask(page)
    page.get_by_role("button", name="Earlier round").click()

    def style(selector: str, name: str) -> str:
        return str(page.eval_on_selector(selector, "(e, name) => getComputedStyle(e)[name]", name))

    ground = style("body", "backgroundColor")
    assert (luminance(ground) < 0.2) == (scheme == "dark")
    pairs = {
        "answer": (style(".answer", "color"), ground),
        "tinted": (style(".drafted", "color"), style(".drafted", "backgroundColor")),
        "small print": (style(".state", "color"), ground),
        "question": (style(".question", "color"), style(".question", "backgroundColor")),
        "button": (style("#send", "color"), style("#send", "backgroundColor")),
        "figure's name": (style(".figures dt", "color"), style(".figures", "backgroundColor")),
        **{name: (style(f".text pre .{name}", "color"), style(".text pre", "backgroundColor")) for name in CODE},
        "error": (style("#error", "color"), style("#error", "backgroundColor")),
    }
    for state in ("root", "accepted", "rejected", "bonus"):
        pairs[state] = (style(f".tree-node.{state} text", "fill"), style(f".tree-node.{state} .body", "fill"))
    pairs |= {f"tinted {name}": (pairs[name][0], style(".drafted", "backgroundColor")) for name in CODE}
    assert len({pairs[name][0] for name in CODE}) == len(CODE)
    low = {name: round(contrast(*pair), 2) for name, pair in pairs.items() if contrast(*pair) < 4.5}
    assert low == {}


def test_two_fingers_that_zoom_leave_the_page_as_high_as_it_is(visitor: Visitor, server: ScriptedServer) -> None:
    # Few pixels, a page that was drawn, and a long wait: when frames come depends on what else runs.
    page = visitor.open(server.url, **{**IPAD, "device_scale_factor": 1})
    page.evaluate("() => new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
    resized = "visualViewport.addEventListener('resize', () => (window.zooms = (window.zooms ?? 0) + 1))"
    page.evaluate(resized)
    before = page.evaluate("document.body.getBoundingClientRect().height")
    page.context.new_cdp_session(page).send("Emulation.setPageScaleFactor", {"pageScaleFactor": 2})
    page.wait_for_function("visualViewport.scale === 2 && window.zooms", polling=50, timeout=60_000)
    assert page.evaluate("visualViewport.height") < 0.6 * before
    assert abs(page.evaluate("document.body.getBoundingClientRect().height") - before) <= 1


@pytest.mark.parametrize("size", [(820, 1180), (1180, 820), (744, 1133), (390, 844)], ids=str)
def test_touch_screens(visitor: Visitor, server: ScriptedServer, size: tuple[int, int]) -> None:
    """Nothing scrolls sideways, everything can be hit with a finger, nothing needs a pointer that hovers."""
    page = visitor.open(server.url, **{**IPAD, "viewport": {"width": size[0], "height": size[1]}})
    long = "word " * 300 + "x" * 400 + "\n\n```\n" + "code " * 100 + "\n```"
    server.scripts = [[chunk([(long, True)], ROUND_1), USAGE, DONE]]
    page.get_by_label("Message").fill("y" * 300)
    page.get_by_role("button", name="Send").tap()
    finished(page)
    assert page.evaluate("[innerWidth, document.scrollingElement.scrollWidth]") == [size[0], size[0]]
    right = "all => Math.max(...all.map(e => e.getBoundingClientRect().right))"
    assert page.locator(".bar *, .figures *, .compose *, .question, .answer").evaluate_all(right) <= size[0]
    assert page.eval_on_selector("#log", "e => e.scrollWidth <= e.clientWidth")
    if page.locator("#rounds").is_hidden():
        page.get_by_role("button", name="Tree", exact=True).tap()
    page.locator('[data-node="3"]').tap()
    expect(page.locator("#node")).to_contain_text("confidence 50 %")
    sizes = "a => a.filter(e => e.checkVisibility()).map(e => [e.id || e.textContent, e.getBoundingClientRect()])"
    targets = page.locator("button, input, textarea, .tree-node .reach").evaluate_all(sizes)
    assert len(targets) > 10
    assert [name for name, box in targets if box["height"] < 44 and name != ""] == []
    page.get_by_role("button", name="Settings").tap()
    fields = page.locator("dialog[open] :is(button, input, select, textarea)").evaluate_all(sizes)
    assert [name for name, box in fields if box["height"] < 44] == []
    assert page.evaluate("document.scrollingElement.scrollWidth") <= size[0]
    small = "all => all.filter(e => parseFloat(getComputedStyle(e).fontSize) < 16).length"  # iPadOS would zoom in
    assert page.locator("textarea, select, input:not([type=range])").evaluate_all(small) == 0


def test_keyboard_alone(page: Page, server: ScriptedServer) -> None:
    message = page.get_by_label("Message")
    expect(message).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    finished(page)
    assert server.requests[0]["messages"][0]["content"] == "one\ntwo"
    expect(message).to_be_focused()
    page.keyboard.press("Enter")  # an empty message is not sent
    seen = []
    describe = "(e => e.id || e.getAttribute('role') || e.textContent)(document.activeElement)"
    outlined = """(() => {
        const own = getComputedStyle(document.activeElement);
        const body = document.activeElement.querySelector?.(".body");
        const around = document.activeElement.closest(".composer");
        return own.outlineStyle !== "none" || (body && getComputedStyle(body).strokeWidth === "3px")
            || (around && getComputedStyle(around).boxShadow !== "none");
    })()"""
    for _ in range(20):
        page.keyboard.press("Tab")
        here = page.evaluate(describe)
        if here in seen or page.evaluate("document.activeElement === document.body"):
            break
        assert page.evaluate(outlined), f"{here}: focus cannot be seen"
        seen.append(here)
    page.get_by_label("Message").focus()
    for _ in range(20):
        page.keyboard.press("Shift+Tab")
        seen.append(page.evaluate(describe))
    assert {"message", "send", "earlier", "round", "treeitem", "Show trees", "Try again", "log"} <= set(seen)
    assert {"tint", "tree", "settings-open", "new"} <= set(seen)
    page.locator("#settings-open").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    expect(page.get_by_label("System prompt")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Settings")).to_be_hidden()
    expect(page.locator("#settings-open")).to_be_focused()
    assert len(server.requests) == 1


def test_a_screen_reader_gets_whole_paragraphs(page: Page, server: ScriptedServer) -> None:
    gate = threading.Event()
    server.scripts = [[chunk([("First *part*.\n\nSec", False)]), gate, chunk([("ond.", False)]), DONE]]
    say(page)
    speaker = page.locator("[aria-live=polite]")
    expect(speaker).to_have_text("First part.")
    expect(page.get_by_role("article")).to_have_attribute("aria-busy", "true")
    gate.set()
    expect(speaker).to_have_text("Second.")
    expect(page.get_by_role("article")).to_have_attribute("aria-busy", "false")
    unnamed = "all => all.filter(e => !e.labels.length && !e.ariaLabel).length"
    assert page.locator("textarea, select, input").evaluate_all(unnamed) == 0
    nameless = "all => all.filter(e => !e.textContent.trim() && !e.ariaLabel).length"
    assert page.locator("button").evaluate_all(nameless) == 0


def test_the_page_works_below_a_path(visitor: Visitor, server: ScriptedServer) -> None:
    """As behind a proxy that gives it a folder of its own."""
    page = visitor.open(server.url)
    inside, root = f"{server.url}/models/mine/", f"{server.url}/"
    page.route(f"{inside}**", lambda route: route.continue_(url=route.request.url.replace(inside, root)))
    page.goto(inside)
    ask(page)
    expect(page.locator(".answer .text")).to_have_text("Soft grey clouds.")


def test_following_stops_when_the_reader_scrolls_up(page: Page, server: ScriptedServer) -> None:
    gate = threading.Event()
    server.scripts = [[chunk([("line\n\n" * 60, False)]), gate, chunk([("more\n\n" * 60, False)]), DONE]]
    say(page)
    at_end = "e => e.scrollHeight - e.scrollTop < e.clientHeight + 5"
    expect(page.locator(".text p")).to_have_count(60)
    page.wait_for_function(f"() => ({at_end})(document.getElementById('log'))")
    page.evaluate("document.getElementById('log').scrollTop = 0")
    gate.set()
    finished(page)
    assert page.evaluate("document.getElementById('log').scrollTop") == 0


LISTEN = """() => {
    const real = window.fetch;
    window.fetch = async (...request) => {
        const response = await real(...request);
        if (!request[0].endsWith("completions")) return response;
        const [mine, theirs] = response.body.tee();
        window.heard = new Response(mine).text();
        return new Response(theirs, response);
    };
}"""


def test_with_the_real_server(visitor: Visitor, tmp_path: Path) -> None:
    """Key, settings, text and every round's tree, from a model: the page shows just what the stream says."""
    target, draft = make_folder(tmp_path / "target"), make_folder(tmp_path / "draft", noise=0.02)
    with tiny_environment(tmp_path), serving(loader(target, draft), api_key="right-key-1") as live:
        page = visitor.open(live.url)
        page.get_by_role("textbox", name="Key").fill("right-key-1")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_contain_text("tiny")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Max tokens").fill("40")
        page.get_by_label("Policy").select_option("paper")
        page.get_by_role("button", name="Save").click()
        page.evaluate(LISTEN)
        say(page, "the cat in the hat")
        finished(page)
        heard = page.evaluate("window.heard").splitlines()
        chunks = [json.loads(line[6:]) for line in heard if line.startswith("data: {")]
        said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
        shown = page.locator(".answer .text").text_content() or ""
        markers = r"[\s*_`~#>\\+\-.)0-9]"  # what Markdown may take for its own
        assert re.sub(markers, "", said) == re.sub(markers, "", shown)
        tokens = [token for c in chunks for token in c.get("speculation", {}).get("tokens", [])]
        assert any(token["from_draft"] for token in tokens)
        expect(page.locator(".state")).to_contain_text("40 tokens")
        expect(page.locator(".state")).to_contain_text("ended at the limit of tokens")
        rounds = [c["speculation"]["round"] for c in chunks if "round" in c.get("speculation", {})]
        expect(page.locator("#place")).to_have_text(f"round {len(rounds)} of {len(rounds)}")
        for number, drawn in enumerate(rounds, 1):
            page.get_by_label("Round", exact=True).fill(str(number))
            states = page.locator("[data-node]").evaluate_all("all => all.map(e => e.classList[1])")
            assert states == [n["state"] for n in drawn["nodes"]]
        expect(page.locator("#speed")).to_have_text(re.compile(r"^\d+\.\d$"))
        expect(page.locator("#memory")).to_have_text(re.compile(r"^\d+ MB|^\d\.\d\d GB"))
