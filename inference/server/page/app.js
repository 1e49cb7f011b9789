// The page: who talks, what is said, what is heard.

import { Microphone, RATE, Speaker, decode, encode } from "./audio.js";
import { Realtime } from "./realtime.js";
import { Spectrogram } from "./spectrogram.js";

const at = (id) => document.getElementById(id);
const VAD = { type: "server_vad", silence_duration_ms: 500 };

const state = {
  realtime: null, microphone: null, speaker: null, connecting: null,
  open: false, // the microphone is sent
  waiting: false, // for the browser to give the microphone
  silent: "", // why there is no sound on this page: answers come as text alone
  answer: null, // {response, item, played, started, done, line}: the one that is made or played now
  over: new Set(), // responses that were interrupted: what still comes of them is dropped
  turnEnded: 0, latencies: [], asked: new Map(), // lines of the user's items
};
window.flowomni = state; // for the console and for tests

// ---------------------------------------------------------------------------------------------------------- what is seen

function status(text, kind = "on") {
  at("status").textContent = text;
  at("status").dataset.state = kind;
}

function line(kind, who, text) {
  const item = document.createElement("li");
  item.className = kind;
  const name = Object.assign(document.createElement("span"), { className: "who", textContent: who });
  const said = Object.assign(document.createElement("span"), { className: "said", textContent: text });
  item.append(name, said);
  at("log").append(item);
  at("log").scrollTop = at("log").scrollHeight;
  while (at("log").children.length > 200) at("log").firstChild.remove();
  return item;
}

function lamp(id, active, text) {
  at(id).classList.toggle("active", active);
  at(id).textContent = text;
}

const problem = (text) => text && line("error", "problem", text);

function showMicrophone() {
  const free = at("handsfree").checked;
  at("talk").setAttribute("aria-pressed", state.open);
  at("talk").textContent = free ? (state.open ? "Mute microphone" : "Start talking") : (state.open ? "Release to send" : "Hold to talk");
  at("spacehelp").textContent = free ? "mutes the microphone and opens it again" : "held down: talk; released: send";
  lamp("heard", false, state.waiting ? "allow the microphone" : state.open ? "listening" : state.microphone ? "muted" : "silent");
}

function showAnswering() {
  at("interrupt").disabled = state.answer === null;
  lamp("spoken", state.answer?.started ?? false, state.answer ? (state.answer.started ? "speaking" : "thinking") : "silent");
}

// -------------------------------------------------------------------------------------------------------- the connection

function connect() {
  state.connecting ??= start().finally(() => { state.connecting = null; });
  return state.connecting;
}

async function start() {
  if (state.realtime) return state.realtime;
  status("connecting", "off");
  if (!state.silent) state.speaker ??= await Speaker.open(onPlayback).catch(withoutSound);
  const realtime = new Realtime(at("key").value);
  state.realtime = realtime;
  realtime
    .on("session.created", () => { status(state.silent ? "connected, text only" : "connected"); configure(); })
    .on("session.updated", () => realtime.dispatchEvent(new Event("ready")))
    .on("input_audio_buffer.speech_started", () => { lamp("heard", true, "speaking"); interrupt(false); })
    .on("input_audio_buffer.speech_stopped", () => { lamp("heard", false, "listening"); state.turnEnded = performance.now(); })
    .on("input_audio_buffer.committed", () => line("you", "you", "(spoken)"))
    .on("response.created", onResponse)
    .on("response.output_item.added", ({ item, response_id }) => { if (isCurrent(response_id)) beginPlayback(item.id); })
    .on("response.output_audio_transcript.delta", onText)
    .on("response.output_text.delta", onText)
    .on("response.output_audio.delta", onSound)
    .on("response.output_audio.done", ({ item_id }) => state.speaker.end(item_id))
    .on("response.done", onDone)
    .on("error", ({ error }) => { if (error.code !== "response_cancel_not_active") problem(error.message); })
    .on("closed", onClosed);
  await new Promise((resolve, reject) => {
    realtime.addEventListener("ready", resolve, { once: true });
    realtime.addEventListener("closed", ({ detail }) => reject(new Error(why(detail))), { once: true });
  });
  return realtime;
}

function configure() {
  const detection = at("handsfree").checked ? VAD : null;
  const output_modalities = [state.silent ? "text" : "audio"];
  state.realtime.send("session.update", { session: { type: "realtime", output_modalities, audio: { input: { turn_detection: detection } } } });
}

function withoutSound(error) {
  state.silent = error.message;
  problem(`no sound here, answers come as text: ${error.message}`);
  return null;
}

function why({ code, reason }) {
  if (reason) return ""; // an error event has told it
  return code === 1006 ? "the server does not answer; is it running?" : `the connection was closed (${code})`;
}

function onClosed(detail) {
  const planned = detail.code === 1000 || detail.code === 1005;
  state.realtime = null;
  state.speaker?.flush();
  state.answer = null;
  state.open = false;
  showMicrophone();
  showAnswering();
  status(planned ? "not connected" : "not connected: talk or type to try again", planned ? "off" : "error");
  if (!planned && !state.connecting) problem(why(detail)); // while connecting, whoever asked for it tells
}

// ------------------------------------------------------------------------------------------------------------ the answer

const isCurrent = (response) => state.answer?.response === response && !state.over.has(response);

function onResponse({ response }) {
  state.answer = { response: response.id, item: null, played: 0, started: false, done: false, line: line("model", "FlowOmni", "") };
  showAnswering();
}

function beginPlayback(item) {
  if (state.silent) return;
  state.answer.item = item;
  state.speaker.begin(item);
}

function onText({ response_id, delta }) {
  if (!isCurrent(response_id)) return;
  state.answer.line.querySelector(".said").textContent += delta;
  at("log").scrollTop = at("log").scrollHeight;
}

function onSound({ response_id, item_id, delta }) {
  if (isCurrent(response_id)) state.speaker.push(item_id, decode(delta));
}

function onDone({ response }) {
  state.over.delete(response.id);
  if (response.status === "failed") problem("the answer failed");
  if (state.answer?.response !== response.id) return;
  state.answer.done = true; // it may be played for a while yet: the server speaks faster than real time
  if (response.status === "cancelled") cut();
  else if (state.silent) endAnswer();
}

function onPlayback(report) {
  const answer = state.answer;
  if (answer === null || report.item !== answer.item) return;
  answer.played = report.played ?? answer.played;
  at("gaps").textContent = report.gaps ?? at("gaps").textContent;
  if (report.what === "started") {
    answer.started = true;
    if (state.turnEnded) showLatency(performance.now() - state.turnEnded);
    state.turnEnded = 0;
    showAnswering();
  } else if (report.what === "playing") {
    at("buffered").textContent = `${(report.left / RATE).toFixed(1)} s`;
  } else if (report.what === "full") {
    problem("the answer is longer than the page can hold");
  } else {
    endAnswer();
  }
}

function showLatency(milliseconds) {
  state.latencies.push(milliseconds);
  if (state.latencies.length > 1000) state.latencies.shift();
  const sorted = [...state.latencies].sort((a, b) => a - b);
  at("latency").textContent = `${milliseconds.toFixed(0)} ms`;
  at("median").textContent = `${sorted[sorted.length >> 1].toFixed(0)} ms`;
}

function endAnswer() {
  state.answer = null;
  at("buffered").textContent = "–";
  showAnswering();
}

/** Stop the sound now and say what was heard of it; `asked` by the button or a key, not by the voice. */
function interrupt(asked) {
  const answer = state.answer;
  if (answer === null) return;
  if (asked && !answer.done) state.realtime?.send("response.cancel", { response_id: answer.response });
  if (answer.item !== null) {
    const heard = Math.floor(1000 * answer.played / RATE);
    state.realtime?.send("conversation.item.truncate", { item_id: answer.item, content_index: 0, audio_end_ms: heard });
  }
  if (!answer.done) state.over.add(answer.response);
  cut();
}

function cut() {
  state.answer.line.classList.add("cut");
  state.speaker?.flush();
  endAnswer();
}

// ------------------------------------------------------------------------------------------------------- talk, and type

async function openMicrophone() {
  const realtime = await connect();
  if (!at("handsfree").checked) {
    interrupt(true);
    realtime.send("input_audio_buffer.clear");
  }
  if (!state.microphone) {
    state.open = state.waiting = true;
    showMicrophone();
    try {
      state.microphone = await Microphone.open((block) => {
        if (state.open) state.realtime?.send("input_audio_buffer.append", { audio: encode(block) });
      });
    } finally { state.waiting = false; }
    state.microphone.mute(!state.open); // the key may have been released in between
  } else {
    state.open = true;
    state.microphone.mute(false);
  }
  showMicrophone();
}

function closeMicrophone() {
  if (!state.open) return;
  state.open = false;
  state.microphone?.mute(true);
  if (!at("handsfree").checked && state.microphone) {
    state.realtime?.send("input_audio_buffer.commit");
    state.realtime?.send("response.create");
    state.turnEnded = performance.now();
  } else {
    state.realtime?.send("input_audio_buffer.clear");
  }
  showMicrophone();
}

const MICROPHONE = { // what getUserMedia throws, in words
  NotAllowedError: "the browser was not allowed to use the microphone; typing works",
  NotFoundError: "no microphone was found; typing works",
  NotReadableError: "the microphone cannot be opened, another program may be using it; typing works",
};

const tell = (error) => {
  state.open = false;
  showMicrophone();
  if (!state.realtime) status("not connected: talk or type to try again", "error");
  problem(MICROPHONE[error.name] ?? error.message);
};

const toggle = () => (state.open ? closeMicrophone() : openMicrophone().catch(tell));

async function ask(words) {
  const realtime = await connect();
  interrupt(true);
  line("you", "you", words);
  const item = { type: "message", role: "user", content: [{ type: "input_text", text: words }] };
  realtime.send("conversation.item.create", { item });
  realtime.send("response.create");
  state.turnEnded = performance.now();
}

// -------------------------------------------------------------------------------------------------------------- wiring

at("talk").onclick = (event) => { if (at("handsfree").checked || event.detail === 0) toggle(); };
at("talk").onpointerdown = (event) => {
  if (at("handsfree").checked) return;
  event.target.setPointerCapture(event.pointerId);
  openMicrophone().catch(tell);
};
at("talk").onpointerup = at("talk").onpointercancel = () => { if (!at("handsfree").checked) closeMicrophone(); };
at("interrupt").onclick = () => interrupt(true);
at("handsfree").onchange = () => {
  if (state.open) { state.open = false; state.microphone?.mute(true); state.realtime?.send("input_audio_buffer.clear"); }
  if (state.realtime) configure();
  showMicrophone();
};
at("typed").onsubmit = (event) => {
  event.preventDefault();
  const words = at("words").value.trim();
  at("words").value = "";
  if (words) ask(words).catch(tell);
};
at("key").value = sessionStorage.getItem("key") ?? "";
at("key").onchange = () => {
  sessionStorage.setItem("key", at("key").value);
  state.realtime?.close();
};

const holding = (target) => target === at("talk") && !at("handsfree").checked; // then the space bar is held, not pressed
const busyWithKeys = (target) => !holding(target) && target.closest("input, textarea, button, summary, select");
document.addEventListener("keydown", (event) => {
  if (event.code === "Escape") { interrupt(true); return; }
  if (event.code !== "Space" || busyWithKeys(event.target)) return;
  event.preventDefault();
  if (event.repeat) return;
  if (at("handsfree").checked) toggle(); else openMicrophone().catch(tell);
});
document.addEventListener("keyup", (event) => {
  if (event.code !== "Space" || at("handsfree").checked || busyWithKeys(event.target)) return;
  event.preventDefault(); // or the button that has the focus would be clicked
  closeMicrophone();
});

const you = new Spectrogram(at("you")), model = new Spectrogram(at("model"));
let odd = false;
(function draw() { // every second frame is enough, and leaves more of a small machine to the sound
  requestAnimationFrame(draw);
  odd = !odd;
  if (odd) return;
  you.draw(state.open ? state.microphone?.analyser : null);
  model.draw(state.answer?.started ? state.speaker?.analyser : null);
})();
showMicrophone();
