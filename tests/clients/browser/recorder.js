// AudioWorklet: hands the samples of its first input to the page, in blocks of about 100 ms.
class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.channels = 1;
    this.blocks = [[], []];
    this.length = 0;
  }

  process([input]) {
    if (input.length > 0) {
      this.channels = Math.max(this.channels, input.length);
      this.blocks[0].push(input[0].slice());
      this.blocks[1].push((input[1] ?? input[0]).slice());
      this.length += input[0].length;
    }
    if (this.length >= 4800) {
      const out = this.blocks.map((side) => {
        const joined = new Float32Array(this.length);
        let at = 0;
        for (const block of side) {
          joined.set(block, at);
          at += block.length;
        }
        return joined;
      });
      this.port.postMessage(out, out.map((side) => side.buffer));
      this.blocks = [[], []];
      this.length = 0;
    }
    return true;
  }
}
registerProcessor('recorder', Recorder);
