// Ring buffer of the answer's samples. It says what was really played, item by item, so that an interrupted answer can be
// cut in the context where the listener stopped hearing it.

const SECONDS = 120; // longer than the longest answer: the server speaks faster than real time
const FADE = 120; // samples, 5 ms: stopping at once would click
const START = 0.06; // seconds that are there before it begins: the second piece of an answer may come late
const REPORT = 12; // blocks of 128 samples, 64 ms

class Playback extends AudioWorkletProcessor {
  constructor() {
    super();
    this.ring = new Float32Array(SECONDS * sampleRate);
    this.reset();
    this.blocks = 0;
    this.port.onmessage = ({ data }) => this[data.do](data);
  }

  reset() {
    Object.assign(this, { read: 0, written: 0, item: null, started: false, ended: false, hungry: false, fading: 0, gaps: 0 });
  }

  begin({ item }) { // a new answer: what is left of an old one is dropped
    this.reset();
    this.item = item;
  }

  push({ item, samples }) {
    if (item !== this.item || this.fading) return; // of an answer that is over
    const room = this.ring.length - (this.written - this.read);
    const taken = samples.length > room ? samples.subarray(0, room) : samples;
    for (let index = 0; index < taken.length; index++) this.ring[(this.written + index) % this.ring.length] = taken[index];
    this.written += taken.length;
    if (taken.length < samples.length) this.port.postMessage({ what: "full", item });
  }

  end({ item }) { // all samples of the item are here
    if (item === this.item) this.ended = true;
  }

  flush() { // stop: a short fade, then silence
    if (this.item === null) return;
    const left = this.started ? this.written - this.read : 0; // what has not begun does not begin now
    this.fading = Math.max(1, Math.min(FADE, left));
    this.written = this.read + Math.min(this.fading, left);
    this.ended = true;
  }

  process(_, [[output]]) {
    const ready = this.started || this.ended || this.written >= START * sampleRate;
    const there = ready ? Math.min(output.length, this.written - this.read) : 0;
    for (let index = 0; index < there; index++) {
      const gain = this.fading ? Math.max(0, (this.written - this.read) / this.fading) : 1;
      output[index] = gain * this.ring[this.read++ % this.ring.length];
    }
    if (there > 0 && !this.started) {
      this.started = true;
      this.port.postMessage({ what: "started", item: this.item });
    }
    if (this.started && !this.ended && there < output.length && !this.hungry) this.gaps++; // once for each gap
    this.hungry = this.started && there < output.length;
    if (this.ended && this.item !== null && this.written === this.read) {
      this.port.postMessage({ what: "ended", item: this.item, played: this.read, gaps: this.gaps });
      this.reset();
    } else if (this.item !== null && ++this.blocks % REPORT === 0) {
      this.port.postMessage({ what: "playing", item: this.item, played: this.read, left: this.written - this.read, gaps: this.gaps });
    }
    return true;
  }
}

registerProcessor("playback", Playback);
