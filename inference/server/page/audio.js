// The two ends of the sound: microphone and loudspeaker, each an AudioContext with a worklet.

export const RATE = 24000;
const here = (name) => new URL(name, import.meta.url);

function needWorklets() { // an old browser, or a page that came neither by https nor from this machine
  if (!window.AudioContext || !window.AudioWorkletNode) throw new Error("this browser plays sound for pages only by https or on localhost, or is too old");
}

/** Base64 of PCM16 from float samples, and back. */
export function encode(samples) {
  const bytes = new DataView(new ArrayBuffer(samples.length * 2));
  samples.forEach((value, index) => bytes.setInt16(index * 2, Math.max(-32768, Math.min(32767, Math.round(value * 32767))), true));
  return btoa(String.fromCharCode(...new Uint8Array(bytes.buffer)));
}

export function decode(base64) {
  const text = atob(base64);
  const view = new DataView(Uint8Array.from(text, (letter) => letter.charCodeAt(0)).buffer);
  return Float32Array.from({ length: view.byteLength >> 1 }, (_, index) => view.getInt16(index * 2, true) / 32768);
}

export class Microphone {
  /** `onblock` gets 20 ms of samples at 24 kHz at a time. Throws what getUserMedia throws. */
  static async open(onblock) {
    if (!navigator.mediaDevices) throw new Error("this browser gives the microphone only to https and localhost; typing works");
    needWorklets();
    const stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: true, noiseSuppression: true, autoGainControl: true, channelCount: 1 },
    });
    const microphone = new Microphone();
    microphone.stream = stream;
    try {
      await microphone.connect(new AudioContext({ sampleRate: RATE }), onblock);
    } catch { // Firefox connects a microphone only to a context of its own rate: the worklet changes the rate
      await microphone.context?.close();
      await microphone.connect(new AudioContext(), onblock);
    }
    return microphone;
  }

  async connect(context, onblock) {
    this.context = context;
    await context.audioWorklet.addModule(here("capture-worklet.js"));
    const source = context.createMediaStreamSource(this.stream);
    const capture = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit" });
    capture.port.onmessage = ({ data }) => onblock(data);
    this.analyser = new AnalyserNode(context, { fftSize: 512, smoothingTimeConstant: 0 });
    source.connect(capture);
    source.connect(this.analyser);
    await context.resume();
  }

  /** Muted, the browser shows that nothing is recorded. */
  mute(muted) { this.stream.getTracks().forEach((track) => { track.enabled = !muted; }); }
}

export class Speaker {
  /** `onreport` gets {what: "started" | "playing" | "ended" | "full", item, played, left, gaps}. */
  static async open(onreport) {
    needWorklets();
    const speaker = new Speaker();
    const context = new AudioContext({ sampleRate: RATE, latencyHint: "interactive" });
    await context.audioWorklet.addModule(here("playback-worklet.js"));
    speaker.context = context;
    speaker.output = new AudioWorkletNode(context, "playback", { numberOfInputs: 0, outputChannelCount: [1] });
    speaker.output.port.onmessage = ({ data }) => onreport(data);
    speaker.analyser = new AnalyserNode(context, { fftSize: 512, smoothingTimeConstant: 0 });
    speaker.output.connect(speaker.analyser);
    speaker.output.connect(context.destination);
    await context.resume();
    return speaker;
  }

  send(message, transfer = []) { this.output.port.postMessage(message, transfer); }
  begin(item) { this.send({ do: "begin", item }); }
  push(item, samples) { this.send({ do: "push", item, samples }, [samples.buffer]); }
  end(item) { this.send({ do: "end", item }); }
  flush() { this.send({ do: "flush" }); }
}
