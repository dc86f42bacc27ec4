// The part of the browser client that runs in the page: livekit-client, published and received media, the report.
// It talks to client.mjs over HTTP only: GET /config, POST /log, /audio and /report.

import { ExternalE2EEKeyProvider, Room, RoomEvent, Track, VideoPreset, setLogLevel } from '/livekit-client.mjs';
import {
  DataLog, LOSSY_BYTES, RATE, SETTLE_MS, Sounds, analyse, dataMessage, now, readNumber, readStats, round, sawFrame, stripCells, watchStalls,
} from '/checks.mjs';

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const post = (path, body) => fetch(path, { method: 'POST', body });
const log = (text) => post('/log', String(text));
const o = await (await fetch('/config')).json();

const scenarios = {
  resume: 'signal-reconnect', 'full-reconnect': 'full-reconnect', 'disconnect-on-resume': 'disconnect-signal-on-resume',
  'server-leave': 'server-leave', 'node-failure': 'node-failure', migration: 'migration', 'force-tcp': 'force-tcp', speaker: 'speaker',
};
const audio = new Map();
const sounds = new Map();
const video = new Map();
const data = new Map();
const owners = new Map();
const stops = new Map();
const current = new Map();
const remotes = new Set();
const report = {
  client: o.client, identity: o.identity, connect_ms: null, began_at: null, ended_at: null, stalls: [], audio: [], video: [], data: [], ice: [], remote_candidates: [],
  reconnecting: 0, reconnected: 0, active_speakers: 0, republished: 0, disconnected: null, inbound: [], outbound: [], errors: [],
  timeline: [], user_agent: navigator.userAgent,
};
let leaving = false;
let ended = false;

const fail = (what) => (e) => {
  if (leaving) return;
  log(`${what}: ${e?.stack ?? e}`);
  report.errors.push(`${what}: ${e?.message ?? e}`);
};
window.addEventListener('error', (e) => log(`error: ${e.message}`));
window.addEventListener('unhandledrejection', (e) => log(`rejection: ${e.reason?.stack ?? e.reason}`));
setLogLevel(o.logLevel);
for (const level of ['error', 'warn', ...(o.logLevel === 'debug' ? ['info', 'debug', 'log'] : [])]) {
  const original = console[level].bind(console);
  console[level] = (...args) => {
    original(...args);
    log(`${level}: ${args.map((a) => (typeof a === 'string' ? a : (a?.message ?? JSON.stringify(a)))).join(' ').slice(0, 2000)}`);
  };
}

/** Takes video codecs out of every SDP that this page writes: a browser that was built without them. */
function forget(names) {
  const strip = (sdp) => {
    const sections = sdp.split(/(?=^m=)/m);
    return sections.map((section) => {
      if (!section.startsWith('m=video')) return section;
      const gone = new Set();
      for (const [, pt, codec] of section.matchAll(/^a=rtpmap:(\d+) ([^/]+)/gm)) {
        if (names.includes(codec.toLowerCase())) gone.add(pt);
      }
      for (const [, pt, apt] of section.matchAll(/^a=fmtp:(\d+) apt=(\d+)/gm)) if (gone.has(apt)) gone.add(pt);
      const kept = section.split('\r\n').filter((line) => !gone.has(/^a=(?:rtpmap|fmtp|rtcp-fb):(\d+)/.exec(line)?.[1]));
      kept[0] = kept[0].split(' ').filter((word, i) => i < 3 || !gone.has(word)).join(' ');
      return kept.join('\r\n');
    }).join('');
  };
  for (const method of ['createOffer', 'createAnswer']) {
    const original = RTCPeerConnection.prototype[method];
    RTCPeerConnection.prototype[method] = async function (...args) {
      const { type, sdp } = await original.apply(this, args);
      return { type, sdp: strip(sdp) };
    };
  }
}
if (o.without.length) forget(o.without);

const context = new AudioContext({ sampleRate: RATE, latencyHint: 'playback' });
await context.audioWorklet.addModule('/recorder.js');

const options = {
  adaptiveStream: o.adaptiveStream, dynacast: true, singlePeerConnection: o.pc === 'single',
  publishDefaults: { red: o.red, dtx: o.dtx, simulcast: o.simulcast },
};
if (o.stereo) Object.assign(options.publishDefaults, { forceStereo: true });
// Left out where it is the default, so that a server's steering is followed as an application without a wish would.
if (o.videoCodec !== 'vp8') options.publishDefaults.videoCodec = o.videoCodec;
if (o.e2ee) {
  const keyProvider = new ExternalE2EEKeyProvider();
  await keyProvider.setKey(o.e2ee);
  options.encryption = { keyProvider, worker: new Worker('/livekit-client.e2ee.worker.mjs', { type: 'module' }) };
}
const room = new Room(options);
room
  .on(RoomEvent.Reconnecting, () => report.reconnecting++)
  .on(RoomEvent.SignalReconnecting, () => report.reconnecting++)
  .on(RoomEvent.Reconnected, () => report.reconnected++)
  .on(RoomEvent.ActiveSpeakersChanged, (speakers) => {
    if (speakers.some((s) => s.identity !== report.identity)) report.active_speakers++;
  })
  .on(RoomEvent.Disconnected, (reason) => {
    ended = true;
    if (!leaving) report.disconnected = String(reason);
  })
  .on(RoomEvent.EncryptionError, fail('e2ee'))
  .on(RoomEvent.MediaDevicesError, fail('devices'))
  .on(RoomEvent.TrackSubscriptionFailed, (sid) => fail(`subscription of ${sid}`)('failed'))
  .on(RoomEvent.DataReceived, (payload, participant) => {
    const from = participant?.identity ?? '';
    if (!data.has(from)) data.set(from, new DataLog(from));
    data.get(from).add(payload);
  })
  .on(RoomEvent.TrackUnsubscribed, (track, publication, participant) => {
    if (track.kind === Track.Kind.Audio && current.get(participant.identity) === track) stops.get(participant.identity)?.();
    track.detach().forEach((element) => element.remove());
  })
  .on(RoomEvent.TrackSubscribed, (track, publication, participant) => {
    owners.set(track.mediaStreamTrack.id, participant.identity);
    if (track.kind === Track.Kind.Audio) receiveAudio(track, participant.identity);
    else receiveVideo(track, participant.identity);
  });

function receiveAudio(track, peer) {
  if (!audio.has(peer)) audio.set(peer, [[], []]);
  if (!sounds.has(peer)) sounds.set(peer, new Sounds());
  const sides = audio.get(peer);
  // Chromium gives WebAudio nothing of a remote track that no element plays.
  const element = track.attach();
  element.volume = 0;
  document.querySelector('#media').append(element);
  const recorder = new AudioWorkletNode(context, 'recorder', { numberOfOutputs: 0 });
  recorder.port.onmessage = ({ data: blocks }) => {
    blocks.forEach((block, side) => sides[side].push(block));
    sounds.get(peer).add(blocks[0], 1, 1);
  };
  const source = context.createMediaStreamSource(new MediaStream([track.mediaStreamTrack]));
  source.connect(recorder);
  // A full reconnect brings a new track of the same peer; the old one must not go on adding silence.
  current.set(peer, track);
  stops.get(peer)?.();
  stops.set(peer, () => source.disconnect());
}

function receiveVideo(track, peer) {
  if (!video.has(peer)) video.set(peer, { from: peer, frames: 0, width: 0, height: 0, codec: null, numbered: 0, y4m: null, first_at: null, last_at: null, gap_ms: 0, ids: new Set(), painted: 0 });
  const seen = video.get(peer);
  const element = track.attach();
  // CSS pixels: what adaptive stream asks the server for.
  element.style.width = `${o.element.width}px`;
  document.querySelector('#media').append(element);
  const strip = document.createElement('canvas');
  const painter = strip.getContext('2d', { willReadFrequently: true });
  const frame = () => {
    const { videoWidth: width, videoHeight: height } = element;
    seen.painted++;
    sawFrame(seen);
    if (width && height) {
      if (width * height >= seen.width * seen.height) [seen.width, seen.height] = [width, height];
      const rows = Math.max(2, Math.floor(height / 16));
      if (strip.width !== width || strip.height !== rows) [strip.width, strip.height] = [width, rows];
      painter.drawImage(element, 0, 0, width, rows, 0, 0, width, rows);
      const y = Math.floor(height / 32);
      const row = painter.getImageData(0, y, width, 1).data;
      const number = readNumber(width, height, (x) => row[4 * x + 1]);
      if (number !== null) seen.ids.add(number);
    }
    element.requestVideoFrameCallback(frame);
  };
  element.requestVideoFrameCallback(frame);
}

async function microphone() {
  const channels = o.stereo ? 2 : 1;
  if (o.mic === 'device') {
    // Chromium's fake device plays the file that client.mjs passed on its command line.
    const stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false, channelCount: channels },
    });
    return stream.getAudioTracks()[0];
  }
  const out = new MediaStreamAudioDestinationNode(context, { channelCount: channels, channelCountMode: 'explicit' });
  if (o.tone) {
    const merger = new ChannelMergerNode(context, { numberOfInputs: channels });
    for (let c = 0; c < channels; c++) {
      const source = new OscillatorNode(context, { frequency: o.tone * (1 + c / 2) });
      source.connect(new GainNode(context, { gain: 0.3 })).connect(merger, 0, c);
      source.start();
    }
    merger.connect(out);
  } else {
    const buffer = await context.decodeAudioData(await (await fetch('/speech.wav')).arrayBuffer());
    const source = new AudioBufferSourceNode(context, { buffer, loop: true });
    source.connect(out);
    source.start();
  }
  return out.stream.getAudioTracks()[0];
}

async function camera() {
  if (o.y4m) {
    const stream = await navigator.mediaDevices.getUserMedia({ video: o.y4mSize ? { width: o.y4mSize[0], height: o.y4mSize[1] } : true });
    return stream.getVideoTracks()[0];
  }
  const [width, height] = o.videoSize;
  const canvas = document.querySelector('#camera');
  Object.assign(canvas, { width, height });
  const painter = canvas.getContext('2d');
  // A still background that pans, a moving disc: like a talking head, most of the picture moves little.
  const background = document.createElement('canvas');
  Object.assign(background, { width: 2 * width, height });
  const brush = background.getContext('2d');
  let seed = 1;
  const random = () => (seed = (seed * 16807) % 2147483647) / 2147483647;
  for (let y = 0; y < height; y += 16) {
    for (let x = 0; x < width; x += 16) {
      brush.fillStyle = `hsl(${(360 * x) / width}, 40%, ${30 + 20 * Math.sin(y / 50) + 15 * random()}%)`;
      brush.fillRect(x, y, 16, 16);
      brush.fillRect(x + width, y, 16, 16);
    }
  }
  let number = 0;
  const draw = () => {
    painter.drawImage(background, -(number % width), 0);
    painter.fillStyle = '#c96';
    painter.beginPath();
    painter.arc(width * (0.5 + 0.3 * Math.sin(number / 20)), height * (0.6 + 0.1 * Math.cos(number / 13)), height / 5, 0, 7);
    painter.fill();
    for (const [left, right, white] of stripCells(number)) {
      painter.fillStyle = white ? '#fff' : '#000';
      painter.fillRect(Math.floor(left * width), 0, Math.ceil((right - left) * width), Math.floor(height / 16));
    }
    number++;
  };
  draw();
  setInterval(draw, 1000 / o.fps);
  return canvas.captureStream(o.fps).getVideoTracks()[0];
}

async function publish() {
  const local = room.localParticipant;
  if (o.tone || o.wav) {
    const track = await microphone();
    // A WebAudio track says two channels until its first samples have come, and would be published as stereo.
    const mono = () => o.stereo || !(track.getSettings().channelCount > 1);
    for (let i = 0; i < 1000 && !mono(); i++) await sleep(10);
    if (!mono()) throw new Error('a microphone of one channel has two after 10 s');
    await local.publishTrack(track, { source: Track.Source.Microphone, name: 'microphone' });
  }
  if (o.videoSize || o.y4m) {
    const preset = o.videoBitrate ? { videoEncoding: new VideoPreset(0, 0, o.videoBitrate, 30).encoding } : {};
    const screen = o.videoSource === 'screen';
    const [source, name] = screen ? [Track.Source.ScreenShare, 'screen'] : [Track.Source.Camera, 'camera'];
    await local.publishTrack(await camera(), { source, name, ...preset });
  }
}

async function sendData() {
  await sleep(SETTLE_MS);
  for (let i = 0; i < o.dataCount && !leaving; i++) {
    await room.localParticipant.publishData(dataMessage(true, i, o.dataBytes), { reliable: true, topic: 'test' });
    await room.localParticipant.publishData(dataMessage(false, i, LOSSY_BYTES), { reliable: false, topic: 'test' });
    await sleep(20);
  }
}

async function pollStats() {
  const manager = room.engine?.pcManager;
  if (!manager) return;
  const next = { ice: [], inbound: [], outbound: [] };
  for (const [name, transport] of [['pub', manager.publisher], ['sub', manager.subscriber]]) {
    const stats = await transport?.getStats().catch(() => undefined);
    if (!stats) continue;
    const found = readStats([...stats.values()], manager.subscriber ? name : 'single');
    found.remote_candidates.forEach((address) => remotes.add(address));
    for (const key of ['ice', 'inbound', 'outbound']) next[key].push(...found[key]);
  }
  for (const flow of next.inbound) {
    flow.from = owners.get(flow.track) ?? null;
    delete flow.track;
    const seen = flow.kind === 'video' && video.get(flow.from);
    if (seen && flow.codec) {
      seen.codec = flow.codec.replace('video/', '').toLowerCase();
      // Frames that were decoded and, because the page was late, not shown.
      if (flow.frames > Math.max(seen.frames, seen.painted)) sawFrame(seen);
      seen.frames = Math.max(seen.frames, flow.frames);
    }
  }
  // A peer that has left takes its statistics along: the last ones stay.
  if (next.ice.length) report.ice = next.ice;
  for (const key of ['inbound', 'outbound']) if (next[key].length) report[key] = next[key];
}

/** What the timeline keeps of a stream. */
const sample = ({ kind, codec, rid, ssrc, bytes, frames, width, height, target }) => ({ kind, codec, rid, ssrc, bytes, frames, width, height, target });

/** Video of everybody, asked for or not: what an application does whose window is closed for a while. */
function watch(wanted) {
  for (const participant of room.remoteParticipants.values()) {
    for (const publication of participant.videoTrackPublications.values()) publication.setSubscribed(wanted);
  }
}

function resize(width) {
  for (const element of document.querySelectorAll('#media video')) element.style.width = `${width}px`;
}

async function call() {
  const silent = sleep(5000).then(() => Promise.reject(new Error('the browser does not start audio output; is there a sound server?')));
  await Promise.race([context.resume(), silent]);
  if (o.e2ee) await room.setE2EEEnabled(true);
  const start = performance.now();
  await room.connect(o.url, o.token, { autoSubscribe: true });
  report.connect_ms = round(performance.now() - start, 1);
  report.identity = room.localParticipant.identity;
  await publish();
  const deadline = performance.now() + 1000 * o.waitTimeout;
  while (room.remoteParticipants.size < o.waitPeers) {
    if (performance.now() > deadline) throw new Error(`${room.remoteParticipants.size} of ${o.waitPeers} peers came within ${o.waitTimeout} s`);
    if (ended) throw new Error('disconnected while waiting for peers');
    await sleep(20);
  }
  const started = performance.now();
  report.began_at = now();
  log('the call begins');
  const left = () => 1000 * o.seconds - (performance.now() - started);
  if (o.dataCount) sendData().catch(fail('sending data'));
  if (o.scenario !== 'none') {
    sleep(1000 * o.scenarioAt).then(() => room.simulateScenario(scenarios[o.scenario])).catch(fail('scenario'));
  }
  if (o.pause) {
    sleep(1000 * o.pause.from).then(() => watch(false));
    sleep(1000 * o.pause.to).then(() => watch(true));
  }
  if (o.element.at) sleep(1000 * o.element.at).then(() => resize(o.element.later));
  while (left() > 0 && !ended) {
    await pollStats().catch((e) => log(`stats: ${e}`));
    if (o.timeline) {
      const at = round((performance.now() - started) / 1000, 2);
      report.timeline.push({ at, inbound: report.inbound.map(sample), outbound: report.outbound.map(sample) });
    }
    await sleep(Math.max(1, Math.min(1000, left())));
  }
  if (ended) throw new Error(`disconnected before the end: ${report.disconnected}`);
  await pollStats();
}

async function finish() {
  for (const [peer, sides] of audio) {
    const [left, right] = sides.map((blocks) => {
      const joined = new Float32Array(blocks.reduce((n, b) => n + b.length, 0));
      let at = 0;
      for (const block of blocks) {
        joined.set(block, at);
        at += block.length;
      }
      return joined;
    });
    const entry = { from: peer, ...analyse(left), ...sounds.get(peer).report, wav: null };
    if (o.stereo) ({ tone_hz: entry.tone_hz_right, tone_share: entry.tone_share_right } = analyse(right));
    if (o.record && left.length) {
      const channels = o.stereo ? 2 : 1;
      const pcm = new Int16Array(left.length * channels);
      for (let i = 0; i < left.length; i++) {
        pcm[i * channels] = Math.max(-1, Math.min(1, left[i])) * 32767;
        if (channels === 2) pcm[2 * i + 1] = Math.max(-1, Math.min(1, right[i])) * 32767;
      }
      entry.wav = await (await post(`/audio?peer=${encodeURIComponent(peer)}&channels=${channels}`, pcm.buffer)).text();
    }
    report.audio.push(entry);
  }
  for (const { ids, ...entry } of video.values()) report.video.push({ ...entry, frames: Math.max(entry.frames, entry.painted), numbered: ids.size });
  report.data = [...data.values()].map((d) => d.report);
  report.remote_candidates = [...remotes].sort();
}

const stalls = watchStalls(report.stalls);
try {
  await call();
} catch (e) {
  fail('call')(e);
}
clearInterval(stalls);
report.ended_at = now();
leaving = true;
await Promise.race([room.disconnect().catch((e) => log(e)), sleep(3000)]);
await finish();
await post('/report', JSON.stringify(report));
