// LiveKit test client on the Node SDK (libwebrtc through the Rust FFI). Command line and report: ../README.md.

import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import {
  DataLog, LOSSY_BYTES, RATE, SETTLE_MS, Sounds, analyse, dataMessage, now, readNumber, round, sawFrame, stripCells, watchStalls,
} from './checks.mjs';
import { loadWav, packages, parse, saveWav, usage } from './common.mjs';

// The SDK logs to standard output, which belongs to the report.
process.env.LIVEKIT_LOG_LEVEL ??= 'error';
const o = parse('node');
const rtc = packages()('@livekit/rtc-node');

const scenarios = {
  resume: 'SIMULATE_SIGNAL_RECONNECT',
  'full-reconnect': 'SIMULATE_FULL_RECONNECT',
  'disconnect-on-resume': 'SIMULATE_DISCONNECT_SIGNAL_ON_RESUME',
  'server-leave': 'SIMULATE_SERVER_LEAVE',
  'node-failure': 'SIMULATE_NODE_FAILURE',
  migration: 'SIMULATE_MIGRATION',
  'force-tcp': 'SIMULATE_FORCE_TCP',
  speaker: 'SIMULATE_SPEAKER',
};
if (o.y4m) usage('--video y4m: the Node client has no file input; use the Python or the browser client');

const room = new rtc.Room();
const audio = new Map();
const sounds = new Map();
const video = new Map();
const data = new Map();
const current = new Map();
const remotes = new Set();
const report = {
  client: 'node', identity: o.identity, connect_ms: null, began_at: null, ended_at: null, packets_at: null, stalls: [], audio: [], video: [], data: [], ice: [], remote_candidates: [],
  reconnecting: 0, reconnected: 0, active_speakers: 0, republished: 0, disconnected: null, inbound: [], outbound: [], errors: [],
};
let packets = 0;
let leaving = false;
let ended = false;

const fail = (what) => (e) => {
  if (leaving) return;
  console.error(e);
  report.errors.push(`${what}: ${e?.message ?? e}`);
};

room
  .on('reconnecting', () => report.reconnecting++)
  .on('reconnected', () => report.reconnected++)
  .on('localTrackRepublished', () => report.republished++)
  .on('activeSpeakersChanged', (speakers) => {
    if (speakers.some((s) => s.identity !== report.identity)) report.active_speakers++;
  })
  .on('disconnected', (reason) => {
    ended = true;
    if (!leaving) report.disconnected = rtc.DisconnectReason[reason] ?? String(reason);
  })
  .on('encryptionError', fail('e2ee'))
  .on('trackSubscriptionFailed', (sid, participant, reason) => fail(`subscription of ${sid}`)(reason ?? 'no reason given'))
  .on('dataReceived', (payload, participant) => {
    const from = participant?.identity ?? '';
    if (!data.has(from)) data.set(from, new DataLog(from));
    data.get(from).add(payload);
  })
  .on('trackSubscribed', (track, publication, participant) => {
    // A peer that reconnects in full brings new tracks; the streams of its old ones go on with silence.
    current.set(`${participant.identity} ${track.kind}`, track);
    const receive = track.kind === rtc.TrackKind.KIND_AUDIO ? receiveAudio : receiveVideo;
    receive(track, participant.identity).catch(fail('receiving'));
  });

async function receiveAudio(track, peer) {
  if (!audio.has(peer)) audio.set(peer, []);
  if (!sounds.has(peer)) sounds.set(peer, new Sounds());
  const blocks = audio.get(peer);
  for await (const frame of new rtc.AudioStream(track, RATE, o.stereo ? 2 : 1)) {
    if (current.get(`${peer} ${track.kind}`) !== track) break;
    blocks.push(frame.data.slice());
    sounds.get(peer).add(frame.data, o.stereo ? 2 : 1, 32768);
  }
}

async function receiveVideo(track, peer) {
  if (!video.has(peer)) video.set(peer, { from: peer, frames: 0, width: 0, height: 0, codec: null, numbered: 0, y4m: null, first_at: null, last_at: null, gap_ms: 0, ids: new Set() });
  const seen = video.get(peer);
  for await (const { frame } of new rtc.VideoStream(track)) {
    if (current.get(`${peer} ${track.kind}`) !== track) break;
    seen.frames++;
    sawFrame(seen);
    if (frame.width * frame.height >= seen.width * seen.height) [seen.width, seen.height] = [frame.width, frame.height];
    // Only the luma plane of I420 is needed to read the number.
    const i420 = frame.type === rtc.VideoBufferType.I420 ? frame : frame.convert(rtc.VideoBufferType.I420);
    const number = readNumber(frame.width, frame.height, (x, y) => i420.data[y * frame.width + x]);
    if (number !== null) seen.ids.add(number);
  }
}

async function publish() {
  const local = room.localParticipant;
  if (o.tone || o.wav) {
    const channels = o.stereo ? 2 : 1;
    const source = new rtc.AudioSource(RATE, channels, 100);
    const options = new rtc.TrackPublishOptions({ source: rtc.TrackSource.SOURCE_MICROPHONE, red: o.red, dtx: o.dtx });
    await local.publishTrack(rtc.LocalAudioTrack.createAudioTrack('microphone', source), options);
    sendAudio(source, channels).catch(fail('sending audio'));
  }
  if (o.videoSize) {
    const source = new rtc.VideoSource(...o.videoSize);
    const options = new rtc.TrackPublishOptions({
      source: rtc.TrackSource.SOURCE_CAMERA, simulcast: o.simulcast, videoCodec: rtc.VideoCodec[o.videoCodec.toUpperCase()],
    });
    await local.publishTrack(rtc.LocalVideoTrack.createVideoTrack('camera', source), options);
    sendVideo(source, ...o.videoSize).catch(fail('sending video'));
  }
}

async function sendAudio(source, channels) {
  const pcm = o.wav ? loadWav(o.wav, channels) : null;
  for (let position = 0; !ended && !leaving; position += 480) {
    const block = new Int16Array(480 * channels);
    for (let i = 0; i < 480; i++) {
      for (let c = 0; c < channels; c++) {
        block[i * channels + c] = pcm
          ? pcm[((position + i) * channels + c) % pcm.length]
          : 0.3 * 32767 * Math.sin((2 * Math.PI * o.tone * (1 + c / 2) * (position + i)) / RATE);
      }
    }
    // Waits while the source's queue is full, which is what keeps the pace.
    await source.captureFrame(new rtc.AudioFrame(block, RATE, channels, 480));
  }
}

async function sendVideo(source, width, height) {
  const start = performance.now();
  const data = new Uint8Array((width * height * 3) / 2).fill(128);
  for (let number = 0; !ended && !leaving; number++) {
    // A panning gradient with the frame's number in the strip along the top.
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) data[y * width + x] = 16 + (((x + number * 2) ^ (y >> 2)) & 127);
    }
    for (const [left, right, white] of stripCells(number)) {
      for (let y = 0; y < Math.floor(height / 16); y++) {
        data.fill(white ? 235 : 16, y * width + Math.floor(left * width), y * width + Math.floor(right * width));
      }
    }
    source.captureFrame(new rtc.VideoFrame(data.slice(), width, height, rtc.VideoBufferType.I420), BigInt(Math.round((performance.now() - start) * 1000)));
    await sleep(Math.max(1, start + (number + 1) * (1000 / 30) - performance.now()));
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

// The FFI wraps each statistic into parts (rtc, stream, received, ...).
async function pollStats() {
  let stats;
  try {
    stats = await room.getRtcStats();
  } catch (e) {
    console.error(`stats: ${e.message}`); // refused while the room reconnects
    return;
  }
  const next = { ice: [], inbound: [], outbound: [] };
  for (const [pc, list] of [['pub', stats.publisherStats], ['sub', stats.subscriberStats]]) {
    const byId = new Map(list.map(({ stats: s }) => [s.value.rtc.id, s]));
    const candidate = (id) => byId.get(id).value.candidate;
    const address = (c) => `${c.address}:${c.port}`;
    for (const { case: kind, value } of byId.values()) {
      if (kind === 'remoteCandidate') remotes.add(address(value.candidate));
      else if (kind === 'transport' && byId.has(value.transport.selectedCandidatePairId)) {
        const pair = byId.get(value.transport.selectedCandidatePairId).value.candidatePair;
        const local = candidate(pair.localCandidateId);
        next.ice.push({
          pc: o.pc === 'single' ? 'single' : pc, local: address(local), remote: address(candidate(pair.remoteCandidateId)),
          protocol: local.protocol, bytes_sent: Number(pair.bytesSent), bytes_received: Number(pair.bytesReceived),
          rtt_ms: round(1000 * pair.currentRoundTripTime, 2),
        });
      } else if (kind === 'inboundRtp' || kind === 'outboundRtp') {
        const common = { kind: value.stream.kind, codec: byId.get(value.stream.codecId)?.value.codec.mimeType, ssrc: value.stream.ssrc };
        if (kind === 'inboundRtp') {
          next.inbound.push({
            ...common, packets: Number(value.received.packetsReceived), lost: Number(value.received.packetsLost),
            bytes: Number(value.inbound.bytesReceived), concealed: Number(value.inbound.concealedSamples), frames: value.inbound.framesDecoded,
            nack: value.inbound.nackCount, pli: value.inbound.pliCount,
          });
        } else {
          next.outbound.push({
            ...common, rid: value.outbound.rid, packets: Number(value.sent.packetsSent), bytes: Number(value.sent.bytesSent),
            header_bytes: Number(value.outbound.headerBytesSent), width: value.outbound.frameWidth, height: value.outbound.frameHeight,
          });
        }
      }
    }
  }
  const total = next.inbound.reduce((sum, flow) => sum + flow.packets, 0);
  if (total > packets) report.packets_at = now();
  packets = total;
  // A peer that has left takes its statistics along: the last ones stay.
  for (const key of ['ice', 'inbound', 'outbound']) if (next[key].length) report[key] = next[key];
}

async function call() {
  const options = { autoSubscribe: true, dynacast: true, singlePeerConnection: o.pc === 'single' };
  // Without ratcheting: who has another key would derive 16 new ones for every frame that can't be read, and take both cores for it.
  if (o.e2ee) options.encryption = { keyProviderOptions: { sharedKey: new TextEncoder().encode(o.e2ee), ratchetWindowSize: 0 } };
  const start = performance.now();
  await room.connect(o.url, o.token, options);
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
  console.error('the call begins');
  const left = () => 1000 * o.seconds - (performance.now() - started);
  if (o.dataCount) sendData().catch(fail('sending data'));
  if (o.scenario !== 'none') {
    sleep(1000 * o.scenarioAt).then(() => room.simulateScenario(rtc.SimulateScenarioKind[scenarios[o.scenario]])).catch(fail('scenario'));
  }
  while (left() > 0 && !ended) {
    await pollStats();
    await sleep(Math.max(1, Math.min(1000, left())));
  }
  if (ended) throw new Error(`disconnected before the end: ${report.disconnected}`);
  await pollStats();
}

function finish() {
  const channels = o.stereo ? 2 : 1;
  for (const [peer, blocks] of audio) {
    const pcm = new Int16Array(blocks.reduce((n, b) => n + b.length, 0));
    let at = 0;
    for (const block of blocks) {
      pcm.set(block, at);
      at += block.length;
    }
    const side = (c) => analyse(Float64Array.from({ length: pcm.length / channels }, (_, i) => pcm[i * channels + c] / 32768));
    const entry = { from: peer, ...side(0), ...sounds.get(peer).report, wav: null };
    if (channels === 2) ({ tone_hz: entry.tone_hz_right, tone_share: entry.tone_share_right } = side(1));
    if (o.record && pcm.length) {
      entry.wav = join(o.record, `${report.identity}-from-${peer}.wav`);
      saveWav(entry.wav, pcm, channels);
    }
    report.audio.push(entry);
  }
  // With one video track received the codec is certain; the FFI's statistics do not name the participant.
  const codecs = [...new Set(report.inbound.filter((f) => f.kind === 'video' && f.codec).map((f) => f.codec.replace('video/', '').toLowerCase()))];
  for (const { ids, ...entry } of video.values()) report.video.push({ ...entry, numbered: ids.size, codec: codecs.length === 1 ? codecs[0] : null });
  report.data = [...data.values()].map((log) => log.report);
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
try {
  await Promise.race([room.disconnect(), sleep(5000)]);
} catch (e) {
  report.errors.push(`disconnect: ${e.message}`);
}
finish();
process.stdout.write(`${JSON.stringify(report)}\n`, () => process.exit(report.errors.length ? 1 : 0));
