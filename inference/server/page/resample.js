// Change of rate by a windowed sinc, for browsers that do not give the microphone at the rate we ask for.

const TAPS = 16; // on each side of a sample at the lower of the two rates

/** Streaming: feed blocks of any length, get what is complete. Output sample n is the input at time n * from / to. */
export class Resampler {
  constructor(from, to) {
    this.step = from / to;
    this.cutoff = Math.min(1, to / from); // of the input's Nyquist frequency: no aliasing
    this.reach = Math.ceil(TAPS / this.cutoff);
    this.held = new Float32Array(this.reach); // silence before the first sample
    this.position = this.reach; // of the next output sample, in `held`
  }

  process(block) {
    if (this.step === 1) return Float32Array.from(block);
    const input = new Float32Array(this.held.length + block.length);
    input.set(this.held);
    input.set(block, this.held.length);
    const output = [];
    for (; this.position + this.reach < input.length; this.position += this.step) output.push(this.at(input, this.position));
    const drop = Math.max(0, Math.floor(this.position) - this.reach);
    this.held = input.slice(drop);
    this.position -= drop;
    return Float32Array.from(output);
  }

  at(input, time) {
    const first = Math.ceil(time - this.reach), last = Math.floor(time + this.reach);
    let sum = 0;
    for (let index = Math.max(0, first); index <= last; index++) {
      const away = index - time;
      const angle = Math.PI * away * this.cutoff;
      const sinc = angle === 0 ? 1 : Math.sin(angle) / angle;
      sum += input[index] * sinc * (0.5 + 0.5 * Math.cos(Math.PI * away / this.reach));
    }
    return sum * this.cutoff;
  }
}
