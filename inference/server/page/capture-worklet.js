// Microphone to blocks of 20 ms at 24 kHz, as Float32Array messages.

import { Resampler } from "./resample.js";

const RATE = 24000, BLOCK = 480;

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate, RATE);
    this.block = new Float32Array(BLOCK);
    this.filled = 0;
  }

  process([[channel]]) {
    if (!channel) return true; // the microphone is not connected at this moment
    for (const sample of this.resampler.process(channel)) {
      this.block[this.filled++] = sample;
      if (this.filled < BLOCK) continue;
      this.port.postMessage(this.block, [this.block.buffer]);
      this.block = new Float32Array(BLOCK);
      this.filled = 0;
    }
    return true;
  }
}

registerProcessor("capture", Capture);
