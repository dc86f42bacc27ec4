// What the Node and the browser client check with: data pattern, audio analysis, numbered pictures. No imports, because the
// browser page loads this file as it is. Everything here must agree with ../python/common.py and ../python/picture.py.

/** Sampling rate in Hz of all audio. */
export const RATE = 48000;

/** Size of a message's header: kind (0 reliable, 1 lossy), index and length, big-endian. */
export const DATA_HEADER = 9;

/** Size of a lossy message: under any MTU. */
export const LOSSY_BYTES = 200;

/** Milliseconds between the last peer's arrival and the first data message, for its data channels to open. */
export const SETTLE_MS = 1000;

/** A message whose every byte the receiver can recompute from its header. */
export function dataMessage(reliable, index, size) {
  const bytes = new Uint8Array(size);
  const view = new DataView(bytes.buffer);
  const kind = reliable ? 0 : 1;
  bytes[0] = kind;
  view.setUint32(1, index);
  view.setUint32(5, size);
  for (let i = DATA_HEADER; i < size; i++) bytes[i] = (i * 7 + index * 31 + kind) & 0xff;
  return bytes;
}

/** Messages received from one peer, and how many were not what their header says. */
export class DataLog {
  constructor(from) {
    this.report = { from, reliable: 0, lossy: 0, bytes: 0, bad: 0, duplicates: 0 };
    this.seen = new Set();
  }

  add(bytes) {
    const report = this.report;
    report.bytes += bytes.length;
    if (bytes.length < DATA_HEADER || bytes[0] > 1) {
      report.bad++;
      return;
    }
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
    const kind = bytes[0];
    const index = view.getUint32(1);
    const wanted = view.getUint32(5) === bytes.length ? dataMessage(kind === 0, index, bytes.length) : null;
    if (!wanted || !bytes.every((b, i) => b === wanted[i])) {
      report.bad++;
      return;
    }
    const id = `${kind}/${index}`;
    if (this.seen.has(id)) {
      report.duplicates++;
      return;
    }
    this.seen.add(id);
    if (kind === 0) report.reliable++;
    else report.lossy++;
  }
}

/**
 * Tone, level and holes of one channel of samples (-1 to 1): `tone_hz` is the strongest frequency after the first sound,
 * `tone_share` the part of the power within 3 % of it, `rms` relative to full scale, `silent_ms` the 10 ms blocks under
 * -60 dBFS between the first and the last sound.
 */
export function analyse(samples) {
  const out = { seconds: round(samples.length / RATE, 3), tone_hz: null, tone_share: 0, rms: 0, silent_ms: 0 };
  let first = -1;
  let last = 0;
  const level = [];
  for (let block = 0; (block + 1) * 480 <= samples.length; block++) {
    let sum = 0;
    for (let i = block * 480; i < (block + 1) * 480; i++) sum += samples[i] * samples[i];
    level.push(sum / 480);
    if (sum / 480 > 1e-6) {
      if (first < 0) first = block;
      last = block + 1;
    }
  }
  if (first < 0) return out;
  out.silent_ms = 10 * level.slice(first, last).filter((power) => power <= 1e-6).length;
  const heard = samples.subarray(first * 480, last * 480);
  let sum = 0;
  for (const x of heard) sum += x * x;
  out.rms = round(Math.sqrt(sum / heard.length), 5);
  Object.assign(out, strongest(heard));
  return out;
}

/** Seconds since 1970. */
export const now = () => Date.now() / 1000;

/** Shorter silences are not told of one by one. */
const LEAST_HOLE_MS = 100;

/** A client that its own clock finds later than this stood still: the machine was busy with something else. */
const STALL_MS = 100;

/**
 * When sound of a peer was heard: `heard_ms` counts 10 ms blocks over -60 dBFS, `first_at` and `last_at` are the times of the first
 * and the last of them, and `holes` are the stretches without any between those two: [time at which it began, ms].
 */
export class Sounds {
  constructor() {
    this.report = { heard_ms: 0, first_at: null, last_at: null, holes: [] };
    this.silent = 0;
  }

  /** Interleaved samples of full scale `scale` that have come just now. */
  add(samples, channels, scale) {
    const came = now();
    const size = 480 * channels;
    for (let start = 0; start + size <= samples.length; start += size) {
      let sum = 0;
      for (let i = start; i < start + size; i++) sum += samples[i] * samples[i];
      if (sum / size <= 1e-6 * scale * scale) {
        this.silent += 10;
        continue;
      }
      const report = this.report;
      const at = came - (samples.length - start - size) / channels / RATE;
      if (report.last_at === null) report.first_at = round(at - 0.01, 3);
      else {
        // By the clock, too: blocks that never came are as silent as silent ones.
        const ms = Math.max(this.silent, Math.round(1000 * (at - report.last_at - 0.01)));
        if (ms >= LEAST_HOLE_MS) report.holes.push([report.last_at, ms]);
      }
      report.last_at = round(at, 3);
      report.heard_ms += 10;
      this.silent = 0;
    }
  }
}

/** Notes that a frame has come in what a report says of a video. */
export function sawFrame(seen) {
  const at = now();
  seen.first_at ??= at;
  seen.gap_ms = Math.max(seen.gap_ms, Math.round(1000 * (at - (seen.last_at ?? at))));
  seen.last_at = at;
}

/** Notes into `stalls` when this process did not run for a while: [time at which it began, ms]. */
export function watchStalls(stalls) {
  const step = 20;
  let due = Date.now() + step;
  return setInterval(() => {
    const late = Date.now() - due;
    if (late >= STALL_MS) stalls.push([round(due / 1000, 3), late]);
    due = Date.now() + step;
  }, step);
}

function strongest(samples) {
  const n = 32768;
  const power = new Float64Array(n / 2);
  const re = new Float64Array(n);
  const im = new Float64Array(n);
  for (let start = 0; start === 0 || start + n <= samples.length; start += n) {
    for (let i = 0; i < n; i++) {
      re[i] = (samples[start + i] ?? 0) * (0.5 - 0.5 * Math.cos((2 * Math.PI * i) / n));
      im[i] = 0;
    }
    fft(re, im);
    for (let i = 0; i < n / 2; i++) power[i] += re[i] * re[i] + im[i] * im[i];
  }
  const hz = RATE / n;
  const lowest = Math.ceil(40 / hz);
  let best = lowest;
  let total = 0;
  for (let i = lowest; i < n / 2; i++) {
    total += power[i];
    if (power[i] > power[best]) best = i;
  }
  if (total <= 0) return { tone_hz: null, tone_share: 0 };
  let near = 0;
  let centre = 0;
  for (let i = lowest; i < n / 2; i++) {
    if (i * hz > best * hz * 0.97 - 3 && i * hz < best * hz * 1.03 + 3) {
      near += power[i];
      centre += i * hz * power[i];
    }
  }
  return { tone_hz: round(centre / near, 1), tone_share: round(near / total, 4) };
}

/** In-place radix-2 transform; the length is a power of two. */
function fft(re, im) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [re[i], re[j]] = [re[j], re[i]];
      [im[i], im[j]] = [im[j], im[i]];
    }
  }
  for (let size = 2; size <= n; size <<= 1) {
    const angle = (-2 * Math.PI) / size;
    const half = size / 2;
    const cos = Float64Array.from({ length: half }, (_, k) => Math.cos(angle * k));
    const sin = Float64Array.from({ length: half }, (_, k) => Math.sin(angle * k));
    for (let start = 0; start < n; start += size) {
      for (let k = 0; k < half; k++) {
        const a = start + k;
        const b = a + half;
        const vr = re[b] * cos[k] - im[b] * sin[k];
        const vi = re[b] * sin[k] + im[b] * cos[k];
        re[b] = re[a] - vr;
        im[b] = im[a] - vi;
        re[a] += vr;
        im[a] += vi;
      }
    }
  }
}

export function round(value, digits) {
  return Math.round(value * 10 ** digits) / 10 ** digits;
}

const CELLS = 20;

/** The 20 bits of the strip along a picture's top edge: 16 of the frame number, 4 of a checksum. */
function stripWord(number) {
  const n = number & 0xffff;
  return (n << 4) | ((((n >> 12) ^ (n >> 8) ^ (n >> 4) ^ n) & 15) ^ 10);
}

/** Cells of the strip for frame `number`: [left, right, white] in parts of the width; the strip is 1/16 of the height. */
export function stripCells(number) {
  const word = stripWord(number);
  return Array.from({ length: CELLS }, (_, cell) => [cell / CELLS, (cell + 1) / CELLS, ((word >> (CELLS - 1 - cell)) & 1) === 1]);
}

/** The frame number in a picture, read through `luma(x, y)` (0 to 255), or null where the strip can't be read. */
export function readNumber(width, height, luma) {
  let word = 0;
  for (let cell = 0; cell < CELLS; cell++) {
    const x = Math.floor(((2 * cell + 1) * width) / (2 * CELLS));
    const y = Math.floor(height / 32);
    word = (word << 1) | (luma(x, y) + luma(x - 1, y) + luma(x + 1, y) > 375 ? 1 : 0);
  }
  const number = word >> 4;
  return stripWord(number) === word ? number : null;
}

/** The report's statistics out of the W3C stats of one peer connection, as an array of its entries. */
export function readStats(entries, pc) {
  const byId = new Map(entries.map((entry) => [entry.id, entry]));
  const address = (c) => `${c.address ?? c.ip}:${c.port}`;
  const out = { ice: [], remote_candidates: [], inbound: [], outbound: [] };
  let pairs = entries.filter((e) => e.type === 'transport' && e.selectedCandidatePairId).map((e) => byId.get(e.selectedCandidatePairId));
  // Firefox has no transport entries; it marks the pair itself.
  if (pairs.length === 0) pairs = entries.filter((e) => e.type === 'candidate-pair' && e.selected);
  for (const pair of pairs) {
    const local = pair && byId.get(pair.localCandidateId);
    const remote = pair && byId.get(pair.remoteCandidateId);
    if (!local || !remote) continue;
    out.ice.push({
      pc,
      local: address(local),
      remote: address(remote),
      protocol: local.protocol,
      bytes_sent: Number(pair.bytesSent),
      bytes_received: Number(pair.bytesReceived),
      rtt_ms: round(1000 * (pair.currentRoundTripTime ?? 0), 2),
    });
  }
  for (const e of entries) {
    const mime = byId.get(e.codecId)?.mimeType;
    if (e.type === 'remote-candidate') out.remote_candidates.push(address(e));
    else if (e.type === 'inbound-rtp') {
      out.inbound.push({
        kind: e.kind,
        codec: mime,
        ssrc: e.ssrc,
        track: e.trackIdentifier,
        packets: Number(e.packetsReceived ?? 0),
        lost: Number(e.packetsLost ?? 0),
        bytes: Number(e.bytesReceived ?? 0),
        jitter_ms: round(1000 * (e.jitter ?? 0), 2),
        concealed: Number(e.concealedSamples ?? 0),
        frames: e.framesDecoded ?? 0,
        width: e.frameWidth ?? 0,
        height: e.frameHeight ?? 0,
        nack: e.nackCount ?? 0,
        pli: e.pliCount ?? 0,
      });
    } else if (e.type === 'outbound-rtp') {
      out.outbound.push({
        kind: e.kind,
        codec: mime,
        ssrc: e.ssrc,
        rid: e.rid ?? '',
        packets: Number(e.packetsSent ?? 0),
        bytes: Number(e.bytesSent ?? 0),
        header_bytes: Number(e.headerBytesSent ?? 0),
        width: e.frameWidth ?? 0,
        height: e.frameHeight ?? 0,
        frames: e.framesEncoded ?? 0,
        scalability: e.scalabilityMode ?? null,
        target: Math.round(e.targetBitrate ?? 0),
        nack: e.nackCount ?? 0,
        pli: e.pliCount ?? 0,
      });
    }
  }
  return out;
}
