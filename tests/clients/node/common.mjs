// Command line, tokens, WAV files and packages, shared by the Node and the browser client. Specified in ../README.md.

import { createHmac } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { DATA_HEADER, RATE } from './checks.mjs';

export const SCENARIOS = [
  'none', 'resume', 'full-reconnect', 'disconnect-on-resume', 'server-leave', 'node-failure', 'migration', 'force-tcp', 'speaker',
];

/** Ends the process because of a malformed command line or a missing part. */
export function usage(what) {
  console.error(`${what}; see tests/clients/README.md`);
  process.exit(2);
}

/** A value of the environment, or of the file that scripts/setup.sh writes. */
export function setting(name) {
  if (process.env[name]) return process.env[name];
  const file = join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'auralink', 'env');
  const line = existsSync(file) && readFileSync(file, 'utf8').split('\n').find((l) => l.startsWith(`${name}=`));
  if (!line) usage(`${name} is not set and ${file} does not have it: run scripts/setup.sh clients`);
  return line.slice(name.length + 1);
}

/** `require` for the packages that scripts/setup.sh installed outside the tree. */
export function packages() {
  return createRequire(join(setting('AURALINK_NODE_DIR'), 'package.json'));
}

/** The common command line, resolved; `extra` are further options of one client. */
export function parse(client, extra = {}) {
  const text = (value) => ({ type: 'string', default: value });
  const flag = { type: 'boolean', default: false };
  let values;
  try {
    ({ values } = parseArgs({
      options: {
        url: text('ws://127.0.0.1:7880'), token: text(''), key: text('devkey'), room: text('test'),
        secret: text('secret-of-at-least-32-chars-for-auralink-tests'), identity: text(`${client}-${process.pid}`),
        seconds: text('10'), audio: text('none'), stereo: flag, 'no-red': flag, 'no-dtx': flag, video: text('none'),
        'video-codec': text('vp8'), simulcast: text('1'), data: text('0:0'), e2ee: text(''), pc: text('single'), record: text(''),
        'record-video': flag, scenario: text('none'), 'scenario-at': text('3'), 'wait-peers': text('1'), 'wait-timeout': text('60'),
        ...extra,
      },
    }));
  } catch (e) {
    usage(e.message);
  }
  const number = (name) => {
    const n = Number(values[name]);
    if (!Number.isFinite(n) || n < 0) usage(`--${name} takes a number`);
    return n;
  };
  const o = {
    ...values,
    seconds: number('seconds'), scenarioAt: number('scenario-at'), waitPeers: number('wait-peers'), waitTimeout: number('wait-timeout'),
    simulcast: number('simulcast') !== 0, red: !values['no-red'], dtx: !values['no-dtx'], videoCodec: values['video-codec'],
    recordVideo: values['record-video'], tone: null, wav: null, videoSize: null, y4m: null,
  };
  if (o.audio.startsWith('tone:')) o.tone = Number(o.audio.slice(5)) || usage('--audio tone:HZ needs a frequency');
  else if (o.audio.startsWith('wav:')) {
    o.wav = o.audio.slice(4);
    if (!existsSync(o.wav)) usage(`--audio: no file ${o.wav} (scripts/setup.sh makes the speech files)`);
  } else if (o.audio !== 'none') usage('--audio takes none, tone:HZ or wav:PATH');
  if (o.video.startsWith('y4m:')) {
    o.y4m = o.video.slice(4);
    if (!existsSync(o.y4m)) usage(`--video: no file ${o.y4m}`);
  } else if (o.video !== 'none') {
    const size = /^(\d+)x(\d+)$/.exec(o.video) ?? usage('--video takes none, WIDTHxHEIGHT or y4m:PATH');
    o.videoSize = [Number(size[1]), Number(size[2])];
  }
  if (!['vp8', 'vp9', 'av1', 'h264'].includes(o.videoCodec)) usage('--video-codec takes vp8, vp9, av1 or h264');
  if (!['single', 'dual'].includes(o.pc)) usage('--pc takes single or dual');
  if (!SCENARIOS.includes(o.scenario)) usage(`--scenario takes ${SCENARIOS.join(', ')}`);
  const data = /^(\d+):(\d+)$/.exec(o.data) ?? usage('--data takes COUNT:BYTES');
  o.dataCount = Number(data[1]);
  o.dataBytes = Number(data[2]);
  if (o.dataCount && o.dataBytes < DATA_HEADER) usage(`--data: BYTES is at least ${DATA_HEADER}, the size of the header`);
  if (o.record) mkdirSync(o.record, { recursive: true });
  if (!o.token) o.token = makeToken(o);
  return o;
}

/** A token for identity and room, signed with key and secret (HS256). */
export function makeToken(o) {
  const encode = (value) => Buffer.from(JSON.stringify(value)).toString('base64url');
  const now = Math.floor(Date.now() / 1000);
  const body = `${encode({ alg: 'HS256', typ: 'JWT' })}.${encode({
    iss: o.key, sub: o.identity, nbf: now - 10, exp: now + 3600, video: { roomJoin: true, room: o.room },
  })}`;
  return `${body}.${createHmac('sha256', o.secret).update(body).digest('base64url')}`;
}

/** Samples of a 16-bit 48 kHz WAV file, interleaved for `channels`; mono is copied, stereo is taken as it is or averaged. */
export function loadWav(path, channels) {
  const file = readFileSync(path);
  if (file.toString('latin1', 0, 4) !== 'RIFF') throw new Error(`${path}: not a WAV file`);
  let at = 12;
  let format = null;
  while (at + 8 <= file.length) {
    const id = file.toString('latin1', at, at + 4);
    const size = file.readUInt32LE(at + 4);
    if (id === 'fmt ') {
      format = { channels: file.readUInt16LE(at + 10), rate: file.readUInt32LE(at + 12), bits: file.readUInt16LE(at + 22) };
    } else if (id === 'data') {
      if (!format || format.rate !== RATE || format.bits !== 16) {
        throw new Error(`${path}: ${format?.rate} Hz, ${format?.bits} bit; needed: ${RATE} Hz, 16 bit`);
      }
      const end = Math.min(file.length, at + 8 + size);
      const pcm = new Int16Array(file.buffer.slice(file.byteOffset + at + 8, file.byteOffset + end - ((end - at - 8) % 2)));
      const frames = Math.floor(pcm.length / format.channels);
      const out = new Int16Array(frames * channels);
      for (let i = 0; i < frames; i++) {
        for (let c = 0; c < channels; c++) {
          out[i * channels + c] =
            format.channels === channels ? pcm[i * channels + c]
            : format.channels === 1 ? pcm[i] : (pcm[i * format.channels] + pcm[i * format.channels + 1]) >> 1;
        }
      }
      return out;
    }
    at += 8 + size + (size % 2);
  }
  throw new Error(`${path}: no samples in it`);
}

/** Writes interleaved int16 samples at 48 kHz. */
export function saveWav(path, pcm, channels) {
  const bytes = Buffer.from(pcm.buffer, pcm.byteOffset, pcm.byteLength);
  const head = Buffer.alloc(44);
  head.write('RIFF', 0);
  head.writeUInt32LE(36 + bytes.length, 4);
  head.write('WAVEfmt ', 8);
  head.writeUInt32LE(16, 16);
  head.writeUInt16LE(1, 20);
  head.writeUInt16LE(channels, 22);
  head.writeUInt32LE(RATE, 24);
  head.writeUInt32LE(RATE * 2 * channels, 28);
  head.writeUInt16LE(2 * channels, 32);
  head.writeUInt16LE(16, 34);
  head.write('data', 36);
  head.writeUInt32LE(bytes.length, 40);
  writeFileSync(path, Buffer.concat([head, bytes]));
}
