"""The page of `molora serve` in a browser: on a real server, and on one whose answers are written here."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from peft import LoraConfig, get_peft_model
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from transformers import AutoModelForCausalLM, AutoTokenizer

from molora import from_adapters
from molora.assets import MOLORA_TINY
from molora.bench.serving import listening
from molora.serve.answers import Format, Piece
from molora.serve.app import create_app
from molora.serve.launch import make_server
from molora.serve.page import page_response
from molora.serve.tracing import TokenRouting

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (apt: chromium-driver)"),
    pytest.mark.slow,
]
EXPERTS = ("sql", "math", "code")


class Page:
    """A browser with the page open."""

    def __init__(self, driver: Any) -> None:
        self.driver, self.run = driver, driver.execute_script

    def open(self, url: str, width: int = 1280, dark: bool = False) -> None:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(url)
        self.run("sessionStorage.clear()")
        self.driver.get("about:blank")  # the same address with a fragment would not be loaded again
        self.driver.get(url)
        self.wait(lambda: self.run("return models.length > 0 || !document.getElementById('alert').hidden"))

    def wait(self, condition: Callable[[], Any], seconds: float = 20.0) -> None:
        ends = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < ends, self.all("body")[0].text
            time.sleep(0.05)

    def one(self, name: str) -> Any:
        return self.driver.find_element(By.ID, name)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)

    def give_key(self, key: str) -> None:
        self.one("key").clear()
        self.one("key").send_keys(key, Keys.ENTER)

    def open_with_key(self, url: str) -> None:
        self.open(url + "#completion")
        self.give_key("right")
        self.wait(lambda: self.run("return models.length > 0"))

    def send(self, prompt: str, max_tokens: int = 8, wait: bool = True) -> None:
        """By keyboard alone."""
        self.run("document.getElementById('max_tokens').value = arguments[0]", max_tokens)
        self.one("prompt").send_keys(prompt, Keys.CONTROL, Keys.ENTER)
        if wait:
            self.wait(lambda: self.run("return running === null"))


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Page(driver)
        severe = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        wrong = [message for message in severe if "Failed to load resource" not in message]  # refusals are tested here
        assert not wrong, wrong  # a script error, or what the policy forbids
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """molora-tiny with three random experts behind a key."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(EXPERTS):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(MOLORA_TINY), config).save_pretrained(folder / name)
    model = from_adapters(
        AutoModelForCausalLM.from_pretrained(MOLORA_TINY), {name: folder / name for name in EXPERTS}, router="arrow"
    )
    server = make_server(
        model, AutoTokenizer.from_pretrained(MOLORA_TINY), "tiny", base_name="bare", api_key="right", cache_tokens=1024
    )
    with listening(create_app(server, drain_s=0.0)) as url:
        yield url


def use_of_experts(page: Page) -> tuple[list[float], list[int]]:
    """Widths of the bar's parts and the legend's numbers, in percent."""
    widths = page.run("return [...document.querySelectorAll('.bar .fill')].map(e => parseFloat(e.style.width))")
    return widths, [int(text.split()[0]) for text in page.texts(".legend b")]


def test_an_answer_streams_in_the_colours_of_its_experts_beside_the_base(page: Page, served: str) -> None:
    page.open(served + "#completion")
    assert "asks for an API key" in page.one("alert").text
    page.give_key("wrong")
    page.wait(lambda: "did not take this API key" in page.one("alert").text)
    page.send("The old house")
    page.wait(lambda: "did not take" in page.one("alert").text)
    assert page.one("prompt").get_attribute("value") == "The old house"  # nothing typed is lost
    page.give_key("right")
    page.wait(lambda: not page.one("alert").is_displayed())
    assert page.run("return [sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    assert page.texts("#model option") == ["tiny", "bare (without experts)", *(f"{name} (alone)" for name in EXPERTS)]

    page.send("", max_tokens=24)
    assert page.texts(".answer h3") == ["tiny", "bare"] and page.texts(".meta") == ["24 tokens", "24 tokens"]
    mixture, bare = page.texts(".text")
    assert mixture and bare and page.run("return turns[0].answers[0].text").lstrip(" ") == mixture
    assert len(page.all(".token")) == 24 and not page.all(".answer:nth-child(2) .token")
    assert page.run("return new Set([...document.querySelectorAll('.token')].map(e => e.style.cssText)).size") > 1
    widths, percents = use_of_experts(page)
    assert len(widths) == 3 and sum(widths) == pytest.approx(100, abs=0.01) and sum(percents) == 100
    assert [abs(w - p) < 1 for w, p in zip(widths, percents, strict=True)] == [True] * 3
    assert page.texts(".legend span:nth-child(2)") == list(EXPERTS)
    assert "".join(page.texts("#spoken span")).split() == mixture.split()  # what a screen reader is told


def test_all_tokens_are_reached_by_keyboard_and_show_their_shares(page: Page, served: str) -> None:
    page.open_with_key(served)
    page.send("It was")
    page.run("document.querySelector('.token').focus()")
    assert page.one("shares").is_displayed()
    page.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    second = page.driver.switch_to.active_element
    assert page.run("return [...document.querySelectorAll('.token')].indexOf(arguments[0])", second) == 1
    assert len(page.all(".token[tabindex='0']")) == 1
    shares = dict(zip(page.texts("#shares div span"), page.texts("#shares b"), strict=True))
    assert set(shares) == set(EXPERTS) and sum(int(text.split()[0]) for text in shares.values()) == 100
    second.send_keys(Keys.ESCAPE)
    assert not page.one("shares").is_displayed()


def test_stop_ends_the_answer_and_one_expert_alone_answers(page: Page, served: str) -> None:
    page.open_with_key(served)
    page.run("document.getElementById('compare').click(); document.getElementById('model').value = 'math'")
    page.send("It was", max_tokens=400, wait=False)
    page.wait(lambda: page.all(".token"))
    page.one("stop").click()
    page.wait(lambda: page.run("return running === null"))
    assert page.texts(".note") == ["Stopped."] and page.texts("h3") == ["math"] and len(page.all(".token")) < 400
    assert use_of_experts(page)[1] == [0, 100, 0]


def test_a_conversation_goes_on_with_what_was_said(page: Page, served: str) -> None:
    page.open_with_key(served)
    page.run("document.querySelector('[value=chat]').click()")
    page.run("window.sent = []; const real = fetch; fetch = (p, o) => { sent.push([p, o.body]); return real(p, o); }")
    for prompt in ("Once", "Then"):
        page.send(prompt, max_tokens=4)
    assert not page.one("alert").is_displayed(), page.one("alert").text
    said = page.run("return turns[0].answers.map(a => a.text)")
    sent = [(path, json.loads(body)) for path, body in page.run("return sent")][2:]  # of the second turn
    assert [(path, body["model"]) for path, body in sent] == [
        ("v1/chat/completions", name) for name in ("tiny", "bare")
    ]
    for (_, body), text in zip(sent, said, strict=True):
        told = [message["content"] for message in body["messages"]]
        assert told == (["Once", text, "Then"] if text else ["Then"])  # an answer without text is no turn
    assert len(page.all(".turn")) == 2


def test_refusals_are_shown_in_the_words_of_the_server(page: Page, served: str) -> None:
    page.open_with_key(served)
    page.run("document.getElementById('max_tokens').removeAttribute('max')")
    page.send("It was", max_tokens=100000)
    assert "there is room for" in page.one("alert").text and page.one("prompt").get_attribute("value") == "It was"


# ---- answers written here


def written(pieces: list[Piece], done: bool = True, traced: bool = True) -> Any:
    """A server that has one model and one answer."""
    app = FastAPI()
    form = Format("model", False, "mean" if traced else None, None)

    @app.get("/")
    async def index():
        return page_response()

    @app.get("/v1/models")
    async def models():
        offers = {"chat": False, "routed_experts": traced, "max_model_len": 64}
        return {"data": [{"id": "model", "kind": "mixture", **offers}]}

    @app.post("/v1/completions")
    async def completions():
        events = [json.dumps(form.chunk(0, piece)) for piece in pieces]
        events.append("[DONE]" if done else json.dumps({"error": {"message": "the engine failed"}}))
        return StreamingResponse((f"data: {event}\n\n" for event in events), media_type="text/event-stream")

    return app


def token(experts: Sequence[str], share: list[float]) -> TokenRouting:
    return TokenRouting(tuple(experts), torch.tensor(share), torch.tensor([share]))


def test_nothing_a_server_says_becomes_html(page: Page) -> None:
    evil = "<img src=x onerror=alert(1)>"
    with listening(written([Piece([evil], [token([evil], [1.0])], "stop")])) as url:
        page.open(url)
        page.send(evil)
        assert page.texts(".text") == [evil] == page.texts(".prompt") and evil in page.texts(".legend")[0]
        assert not page.all("img")


def test_more_experts_than_colours_and_a_character_of_several_tokens(page: Page) -> None:
    experts = [f"expert-{n}" for n in range(30)]
    routing = [token(experts, row) for row in torch.eye(30).tolist()]
    texts = ["", "", *(f" w{n}" for n in range(27)), "\n"]  # the first three tokens are one word
    with listening(written([Piece(texts[:5], routing[:5]), Piece(texts[5:], routing[5:], "stop")])) as url:
        page.open(url, width=390)
        page.send("x")
        assert page.texts(".text") == ["".join(texts).lstrip()] and page.texts(".meta") == ["30 tokens"]
        looks = (
            "return [...document.querySelectorAll('.bar .fill')].map(e => e.className + e.style.cssText.split(';')[0])"
        )
        assert len(set(page.run(looks))) == 28  # 7 colours times 4 patterns, then again
        widths, percents = use_of_experts(page)
        assert sum(widths) == pytest.approx(100, abs=0.01) and sum(percents) == 100 and len(percents) == 12
        assert page.texts(".legend li:last-child span") == ["19 others"]
        page.run("document.querySelector('.token').focus()")
        assert "mean of 3 tokens" in page.one("shares").text
        assert page.run("return document.scrollingElement.scrollWidth <= innerWidth")


def test_an_answer_that_breaks_off_says_so(page: Page) -> None:
    with listening(written([Piece(["He"], [token(["one"], [1.0])])], done=False)) as url:
        page.open(url)
        page.send("x")
        assert page.texts(".failed") == ["The server broke off. It says: “the engine failed”"]
        assert page.texts(".text") == ["He"]


def test_a_model_that_cannot_be_traced_answers_without_colours(page: Page) -> None:
    with listening(written([Piece([" plain", " text"], [], "length")], traced=False)) as url:
        page.open(url)
        assert "no experts to watch" in page.one("about").text
        page.send("x")
        assert page.texts(".text") == ["plain text"] and not page.all(".bar, .token")
        assert page.texts(".note") == ["Cut at the largest number of tokens."]


@pytest.mark.parametrize("dark", [False, True])
def test_every_colour_leaves_the_text_legible(dark: bool, page: Page) -> None:
    """The deepest colour under the text: a contrast of 4.5 to 1 (WCAG 2.2, 1.4.3)."""
    routing = [token("abcdefg", row) for row in torch.eye(7).tolist()]
    with listening(written([Piece([f"w{n}" for n in range(7)], routing, "stop")])) as url:
        page.open(url, dark=dark)
        page.send("x")
        paint = """
            const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
            const pen = canvas.getContext('2d', {willReadFrequently: true});
            const rgb = (...layers) => {
                for (const colour of layers) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
                return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
            };
            const card = getComputedStyle(document.querySelector('.answer')).backgroundColor;
            return [...document.querySelectorAll('.token')].map(getComputedStyle)
                .map(style => [rgb(style.color), rgb(card, style.backgroundColor)]);
        """
        found = page.run(paint)
        assert len({tuple(ground) for _, ground in found}) == 7
        for ink, ground in found:
            assert contrast(ink, ground) >= 4.5, (ink, ground)
        assert (sum(page.run(paint)[0][0]) > 384) == dark


def contrast(*colours: list[int]) -> float:
    """The ratio of two colours' luminances, by WCAG 2.2."""
    linear = [[(v / 255 / 12.92) if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in c] for c in colours]
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear)
    return (high + 0.05) / (low + 0.05)
