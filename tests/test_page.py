"""The page in real Chromium: it hears a wav as its microphone, and what it plays is what the server sent.

Shapes: S samples.
"""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from starlette.responses import Response
from starlette.routing import Route

from flowomni import FlowOmni
from flowomni.audio import read_audio
from flowomni.evaluation import hear
from flowomni.evaluation.metrics import word_error_rate
from inference.demo import DATA
from inference.engine import Engine
from inference.server.app import Server, ServerOptions
from inference.session import SessionOptions
from tests.serving import SPOKEN, serving, talkative_model

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
RATE = 24_000
QUESTION = DATA / "questions" / "test"
CONVERSATIONS = [json.loads(line) for line in (DATA / "manifest.jsonl").read_text().splitlines()]
RECORDER = """registerProcessor("recorder", class extends AudioWorkletProcessor {
  process([[channel]]) { if (channel) this.port.postMessage(channel.slice()); return true; }
});"""
TAP = """async () => {  // what leaves the page's loudspeaker, recorded where it is rendered: no sample is missed
  const { context, output } = window.flowomni.speaker;
  await context.audioWorklet.addModule("/static/recorder.js");
  const tap = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
  window.played = [];
  tap.port.onmessage = ({ data }) => window.played.push(...data);
  output.connect(tap);
}"""
AFTER_SPEAKER = "() => window.flowomni.speaker !== null"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Answers of random words in a random voice, 3.4 s long: only Chromium takes time."""
    with Engine(talkative_model(max_answer_tokens=40)) as engine:
        yield engine


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a second of silence, then a question, then silence: what the microphone hears."""
    wav_S = read_audio(sorted(QUESTION.glob("*"))[0], 48_000).wav_S
    silent_S = np.zeros(24_000, np.float32)
    path = tmp_path_factory.mktemp("microphone") / "question.wav"
    soundfile.write(path, np.concatenate([silent_S, wav_S, silent_S]), 48_000, subtype="PCM_16")
    return path


def recordable(engine: Engine, **options: Any) -> Server:
    """A server that also gives the page the recorder."""
    server = Server(engine, ServerOptions(**({"session": SPOKEN} | options)))
    script = Route("/static/recorder.js", lambda _: Response(RECORDER, media_type="text/javascript"))
    server.app.router.routes.insert(0, script)
    return server


@contextmanager
def browser(microphone: Path | None = None, allowed: bool = True) -> Iterator[Any]:
    arguments = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
    refused = ["--deny-permission-prompts", "--use-fake-device-for-media-stream"]
    arguments += ["--use-fake-ui-for-media-stream"] if allowed else refused
    if microphone is not None:
        arguments += ["--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={microphone}%noloop"]
    with playwright.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield chromium
        finally:
            chromium.close()


class Watched:
    """A page of the server, with every event that went over its websocket and everything that went wrong."""

    def __init__(self, chromium: Any, port: int, script: str = ""):
        self.sent: list[dict[str, Any]] = []
        self.sent_at: list[float] = []
        self.received: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.origin = f"http://127.0.0.1:{port}"
        self.page = chromium.new_page()
        self.page.set_default_timeout(120_000)
        self.page.add_init_script(script)
        self.page.on("websocket", self._watch)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"{self.origin}/")

    def _watch(self, socket: Any) -> None:
        socket.on("framesent", self._note)
        socket.on("framereceived", lambda message: self.received.append(json.loads(message)))

    def _note(self, message: str) -> None:
        self.sent.append(json.loads(message))
        self.sent_at.append(time.monotonic())

    def until(self, condition: Callable[[], Any], seconds: float = 120.0) -> None:
        """Let the page go on until it holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            kinds = [event["type"] for event in self.received]
            assert time.monotonic() < deadline, f"it never came; received: {kinds[-20:]}, errors: {self.errors}"
            self.page.wait_for_timeout(20)

    def got(self, type_: str) -> list[dict[str, Any]]:
        return [event for event in self.received if event["type"] == type_]

    def gave(self, type_: str) -> list[dict[str, Any]]:
        return [event for event in self.sent if event["type"] == type_]

    def played_S(self) -> np.ndarray:
        """What was played since `TAP`."""
        return audible(np.array(self.page.evaluate("() => window.played"), np.float32))

    def type(self, words: str) -> None:
        self.page.fill("#words", words)
        self.page.press("#words", "Enter")

    def finish(self) -> None:
        """Nothing went wrong, and nothing came from elsewhere."""
        assert self.errors == []
        assert all(url.startswith(self.origin) for url in self.requests), self.requests


def sound(events: list[dict[str, Any]], field: str) -> np.ndarray:
    raw = b"".join(base64.b64decode(event[field]) for event in events)
    return np.frombuffer(raw, "<i2").astype(np.float32) / 32_768


def trimmed(wav_S: np.ndarray) -> np.ndarray:
    there = np.flatnonzero(np.abs(wav_S) > 1e-4)
    return wav_S[there[0] : there[-1] + 1] if len(there) else wav_S[:0]


def audible(wav_S: np.ndarray) -> np.ndarray:
    """Without samples that are exactly zero: silence before, after, and where a busy machine left the player dry."""
    return wav_S[wav_S != 0]


def envelope(wav_S: np.ndarray) -> np.ndarray:
    """Loudness in dB of each 20 ms."""
    frames = wav_S[: len(wav_S) // 480 * 480].reshape(-1, 480)
    return 20 * np.log10(np.sqrt((frames**2).mean(1)) + 1e-3)


def best_likeness(long: np.ndarray, short: np.ndarray) -> float:
    """Correlation of `short` with the piece of `long` that is most like it."""
    windows = np.lib.stride_tricks.sliding_window_view(long, len(short))
    return max(float(np.corrcoef(window, short)[0, 1]) for window in windows if window.std() > 0)


def test_the_page_hears_a_question_and_plays_the_answer(engine: Engine, question: Path) -> None:
    """Spoken into the microphone; turn taking by the server; every sample sent is played, once and in order."""
    with serving(recordable(engine)) as port, browser(question) as chromium:
        watched = Watched(chromium, port)
        page = watched.page
        page.click("#talk")
        page.wait_for_function(AFTER_SPEAKER)
        page.evaluate(TAP)
        watched.until(lambda: watched.got("response.done"))
        watched.until(lambda: page.inner_text("#spoken") == "silent")
        page.wait_for_timeout(300)

        heard_S = sound(watched.gave("input_audio_buffer.append"), "audio")
        assert watched.got("input_audio_buffer.speech_started"), "no speech in it"
        if len(heard_S) / RATE > 0.9 * (watched.sent_at[-1] - watched.sent_at[0]):  # else a busy machine lost pieces
            likeness = best_likeness(envelope(heard_S), envelope(trimmed(read_audio(question, RATE).wav_S)))
            assert likeness > 0.7, "the page did not send what the microphone heard"

        sent_S = audible(sound(watched.got("response.output_audio.delta"), "delta"))
        played_S = watched.played_S()
        assert len(sent_S) > RATE // 4 and len(played_S) == len(sent_S)
        np.testing.assert_allclose(played_S, sent_S, atol=1e-6)
        transcript = watched.got("response.output_audio_transcript.done")[0]["transcript"]
        assert page.inner_text("#log li.model .said").strip() == transcript.strip()
        assert page.inner_text("#latency").endswith("ms")
        watched.finish()


def test_a_question_is_understood_and_the_answer_too(tmp_path: Path) -> None:
    """The model in the box hears the microphone's sum, and what the loudspeaker plays is recognised as its answer."""
    sums = [each["turns"] for each in CONVERSATIONS if (each["family"], each["split"]) == ("plus", "train")]
    asked = sums[0][0]
    words = {word for each in CONVERSATIONS for turn in each["turns"] for word in turn["text"].split()}
    silent_S = np.zeros(24_000, np.float32)
    microphone = tmp_path / "question.wav"
    question_S = np.concatenate([silent_S, read_audio(DATA / asked["audio"], 48_000).wav_S, silent_S])
    soundfile.write(microphone, question_S, 48_000, subtype="PCM_16")
    with Engine(FlowOmni.from_pretrained()) as engine:
        server = recordable(engine, session=SessionOptions())
        with serving(server) as port, browser(microphone) as chromium:
            watched = Watched(chromium, port)
            watched.page.click("#talk")
            watched.page.wait_for_function(AFTER_SPEAKER)
            watched.page.evaluate(TAP)
            watched.until(lambda: watched.got("response.done"), seconds=300)
            watched.until(lambda: watched.page.inner_text("#spoken") == "silent", seconds=60)
            watched.page.wait_for_timeout(300)
            text, played_S = watched.page.inner_text("#log li.model .said"), watched.played_S()
            watched.finish()
    assert " plus " in text and " is " in text, f"{asked['text']!r} was answered by {text!r}"
    [recognised] = hear([played_S], RATE, sorted(words))
    # a word or two are the voice's own mistakes; sound that came in the wrong order or with holes is no sum at all
    assert word_error_rate([text], [recognised]).rate <= 1 / 2, f"{recognised!r} was heard instead of {text!r}"


@pytest.mark.parametrize("there", [True, False])
def test_without_a_microphone_typing_works(engine: Engine, there: bool) -> None:
    """Refused, or not there at all."""
    why = "the browser was not allowed to use the microphone" if there else "no microphone was found"
    with serving(recordable(engine)) as port, browser(allowed=not there) as chromium:
        watched = Watched(chromium, port)
        watched.page.click("#talk")
        watched.page.wait_for_selector("#log li.error")
        assert f"{why}; typing works" in watched.page.inner_text("#log li.error")
        assert watched.page.inner_text("#heard") == "silent" and watched.page.inner_text("#status") == "connected"
        watched.type("hello")
        watched.until(lambda: watched.got("response.done"))
        watched.finish()


def test_without_sound_answers_come_as_text(engine: Engine) -> None:
    """As on a page by http from another machine: browsers have no AudioWorklet there."""
    with serving(recordable(engine)) as port, browser() as chromium:
        watched = Watched(chromium, port, script="delete window.AudioWorkletNode")
        watched.type("hello")
        watched.until(lambda: watched.got("response.done"))
        assert "answers come as text" in watched.page.inner_text("#log li.error")
        assert watched.page.inner_text("#status") == "connected, text only"
        said = watched.got("response.output_text.done")[0]["text"]
        assert watched.page.inner_text("#log li.model .said").strip() == said.strip() != ""
        watched.until(lambda: watched.page.is_disabled("#interrupt"))
        watched.finish()


def test_a_server_that_goes_and_comes_back(engine: Engine) -> None:
    """The page says so, and goes on when asked to, without being loaded anew."""
    with browser() as chromium:
        with serving(recordable(engine)) as port:
            watched = Watched(chromium, port)
            watched.type("hello")
            watched.until(lambda: watched.got("response.done"))
        watched.page.wait_for_selector("#log li.error")
        assert "try again" in watched.page.inner_text("#status")
        watched.type("hello")
        watched.page.wait_for_selector("#log li.error >> nth=1")
        assert "the server does not answer" in watched.page.inner_text("#log li.error >> nth=1")
        with serving(recordable(engine), port=port):
            watched.type("hello")
            watched.until(lambda: len(watched.got("response.done")) == 2)
            assert watched.page.inner_text("#status") == "connected"


def test_keys_words_and_interruption(engine: Engine) -> None:
    """A typed question; Escape stops the sound at once, and the server is told what was heard of it."""
    with serving(recordable(engine)) as port, browser() as chromium:
        watched = Watched(chromium, port)
        page = watched.page
        watched.type("what day comes after monday")
        page.wait_for_function(AFTER_SPEAKER)
        page.evaluate(TAP)
        watched.until(lambda: page.inner_text("#spoken") == "speaking")
        page.wait_for_timeout(200)
        page.keyboard.press("Escape")
        page.wait_for_timeout(700)  # until what the loudspeaker had already taken is recorded
        watched.until(lambda: watched.got("conversation.item.truncated"))
        cut = watched.gave("conversation.item.truncate")[0]
        played_S, sent_S = watched.played_S(), audible(sound(watched.got("response.output_audio.delta"), "delta"))
        assert cut["item_id"] == watched.got("response.output_item.added")[0]["item"]["id"]
        assert len(played_S) < len(sent_S), "it was not interrupted"
        fade = 120
        # a part of it: a busy machine may record its start late, or play with a gap
        half = len(played_S) // 2
        piece_S = played_S[half : -2 * fade]
        starts = np.flatnonzero(np.isclose(sent_S[: len(sent_S) - len(piece_S) + 1], piece_S[0], atol=1e-6))
        found = [n for n in starts if np.allclose(sent_S[n : n + len(piece_S)], piece_S, atol=1e-6)]
        assert found, "what was played is no part of what was sent"
        assert 0 < cut["audio_end_ms"] <= 1000 * (found[0] + len(played_S) - half) / RATE + 100
        assert page.locator("#log li.model.cut").count() == 1
        assert page.inner_text("#spoken") == "silent" and page.is_disabled("#interrupt")

        watched.type("what is two plus two")  # and the conversation goes on
        watched.until(lambda: len(watched.got("response.done")) == 2)
        assert page.locator("#log li.model").count() == 2
        watched.finish()


def test_push_to_talk_by_the_space_bar(engine: Engine, question: Path) -> None:
    """Held down: talk; released: the turn is committed and answered. No mouse is needed."""
    with serving(recordable(engine)) as port, browser(question) as chromium:
        watched = Watched(chromium, port)
        page = watched.page
        page.focus("#handsfree")
        assert page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") != "none"
        page.uncheck("#handsfree")
        page.evaluate("() => document.activeElement.blur()")
        page.keyboard.down("Space")
        watched.until(lambda: len(watched.gave("input_audio_buffer.append")) > 100)  # two seconds
        page.keyboard.up("Space")
        watched.until(lambda: watched.got("response.done"))
        order = [event["type"] for event in watched.sent if event["type"] != "input_audio_buffer.append"]
        assert order == ["session.update", "input_audio_buffer.clear", "input_audio_buffer.commit", "response.create"]
        assert not watched.got("input_audio_buffer.speech_started")
        watched.finish()


def test_a_refused_page_says_why(engine: Engine) -> None:
    """A wrong key is told in words; the right one, typed into the page, connects."""
    with serving(recordable(engine, api_key="the-key")) as port, browser() as chromium:
        watched = Watched(chromium, port)
        page = watched.page
        watched.type("hello")
        page.wait_for_selector("#log li.error")
        assert "API key" in page.inner_text("#log li.error >> nth=0")
        page.click("summary")
        page.fill("#key", "the-key")
        watched.type("hello")
        watched.until(lambda: watched.got("response.done"))
        assert watched.requests and all(url.startswith(watched.origin) for url in watched.requests)


def test_rates_are_changed_without_a_trace(engine: Engine) -> None:
    """For browsers that give the microphone at another rate: a tone stays the tone, in blocks of any length."""
    change = """async ([rate, hz]) => {
      const { Resampler } = await import("/static/resample.js");
      const wave = Float32Array.from({ length: rate }, (_, n) => Math.sin(2 * Math.PI * hz * n / rate));
      const resampler = new Resampler(rate, 24000), found = [];
      for (let at = 0, size = 1; at < rate; at += size, size = size % 300 + 1)
        found.push(...resampler.process(wave.subarray(at, at + size)));
      return found;
    }"""
    with serving(recordable(engine)) as port, browser() as chromium:
        watched = Watched(chromium, port)
        for rate in (48_000, 44_100, 16_000, 24_000):
            found_S = np.array(watched.page.evaluate(change, [rate, 1000]))
            wanted_S = np.sin(2 * np.pi * 1000 * np.arange(len(found_S)) / RATE)
            assert abs(len(found_S) - RATE) < 50
            np.testing.assert_allclose(found_S[100:], wanted_S[100:], atol=2e-3)
            if rate > RATE:  # what 24 kHz cannot hold is gone, and not folded down
                assert np.abs(np.array(watched.page.evaluate(change, [rate, 15_500]))[100:]).max() < 0.02
