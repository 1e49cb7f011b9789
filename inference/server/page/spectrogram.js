// A spectrogram that scrolls: newest sound on the right, 0 to 12 kHz from bottom to top.

const QUIET_DB = -95, LOUD_DB = -25;

const PALETTE = Array.from({ length: 256 }, (_, level) => { // black, violet, red, yellow, white: loudness grows all along
  const x = level / 255;
  const rise = (from, to) => Math.round(255 * Math.min(1, Math.max(0, (x - from) / (to - from))));
  return [rise(0.15, 0.6), rise(0.45, 0.9), Math.round(160 * Math.sin(Math.PI * Math.min(1, x * 1.6))) + rise(0.85, 1) / 3];
});

export class Spectrogram {
  constructor(canvas) {
    this.canvas = canvas;
    this.paint = canvas.getContext("2d", { alpha: false });
  }

  /** One column from an AnalyserNode. Silence is drawn too: time goes on. */
  draw(analyser) {
    const { width, height } = this.canvas;
    this.paint.drawImage(this.canvas, -1, 0);
    const column = this.paint.createImageData(1, height);
    const bins = new Float32Array(analyser ? analyser.frequencyBinCount : 0);
    if (analyser) analyser.getFloatFrequencyData(bins);
    for (let y = 0; y < height; y++) {
      const bin = Math.floor((1 - (y + 0.5) / height) * bins.length);
      const loud = bins.length ? (bins[bin] - QUIET_DB) / (LOUD_DB - QUIET_DB) : 0;
      const colour = PALETTE[Math.round(255 * Math.min(1, Math.max(0, Number.isFinite(loud) ? loud : 0)))];
      column.data.set([...colour, 255], y * 4);
    }
    this.paint.putImageData(column, width - 1, 0);
  }
}
