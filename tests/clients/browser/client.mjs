// LiveKit test client in a real browser: livekit-client in Chromium (playwright-core) or Firefox (puppeteer-core over
// WebDriver BiDi). Command line and report: ../README.md. The page's own part is page.mjs.

import { spawn } from 'node:child_process';
import { createReadStream, existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { createServer } from 'node:http';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { packages, parse, saveWav, setting, usage } from '../node/common.mjs';

const here = dirname(fileURLToPath(import.meta.url));
const o = parse('browser', {
  browser: { type: 'string', default: 'chromium' },
  mic: { type: 'string', default: 'webaudio' },
  'adaptive-stream': { type: 'boolean', default: false },
  'video-bitrate': { type: 'string', default: '0' },
  'video-source': { type: 'string', default: 'camera' },
  fps: { type: 'string', default: '30' },
  element: { type: 'string', default: '320' },
  without: { type: 'string', default: '' },
  pause: { type: 'string', default: '' },
  timeline: { type: 'boolean', default: false },
  'log-level': { type: 'string', default: 'warn' },
});
if (!['chromium', 'firefox'].includes(o.browser)) usage('--browser takes chromium or firefox');
if (!['webaudio', 'device'].includes(o.mic)) usage('--mic takes webaudio or device');
if (o.mic === 'device' && (o.browser !== 'chromium' || !o.wav)) usage('--mic device needs Chromium and --audio wav:PATH');
if (o.y4m && o.browser !== 'chromium') usage('--video y4m: needs Chromium');
if (!['camera', 'screen'].includes(o['video-source'])) usage('--video-source takes camera or screen');
if (!(Number(o.fps) > 0)) usage('--fps takes a number');
const element = /^(\d+)(?:@([\d.]+):(\d+))?$/.exec(o.element) ?? usage('--element takes WIDTH or WIDTH@SECONDS:WIDTH');
const pause = /^([\d.]+):([\d.]+)$/.exec(o.pause || '0:0') ?? usage('--pause takes FROM:TO, seconds');
Object.assign(o, {
  client: o.browser, adaptiveStream: o['adaptive-stream'], videoBitrate: Number(o['video-bitrate']), logLevel: o['log-level'],
  videoSource: o['video-source'], fps: Number(o.fps), without: o.without.split(',').filter(Boolean),
  element: { width: Number(element[1]), at: Number(element[2] ?? 0), later: Number(element[3] ?? element[1]) },
  pause: o.pause ? { from: Number(pause[1]), to: Number(pause[2]) } : null,
});
if (o.y4m) {
  const head = readFileSync(o.y4m, { encoding: 'latin1', flag: 'r' }).slice(0, 200).split('\n')[0];
  o.y4mSize = [Number(/ W(\d+)/.exec(head)?.[1]), Number(/ H(\d+)/.exec(head)?.[1])];
}

const livekit = join(setting('AURALINK_NODE_DIR'), 'node_modules', 'livekit-client', 'dist');
const files = {
  '/': [join(here, 'page.html'), 'text/html'],
  '/page.mjs': [join(here, 'page.mjs'), 'text/javascript'],
  '/recorder.js': [join(here, 'recorder.js'), 'text/javascript'],
  '/checks.mjs': [join(here, '..', 'node', 'checks.mjs'), 'text/javascript'],
  '/livekit-client.mjs': [join(livekit, 'livekit-client.esm.mjs'), 'text/javascript'],
  '/livekit-client.e2ee.worker.mjs': [join(livekit, 'livekit-client.e2ee.worker.mjs'), 'text/javascript'],
  ...(o.wav && { '/speech.wav': [o.wav, 'audio/wav'] }),
};

let deliver;
const delivered = new Promise((resolve) => (deliver = resolve));

/** Serves the page and takes what it sends: log lines, recordings, the report. */
const server = createServer(async (request, response) => {
  const url = new URL(request.url, 'http://localhost');
  if (request.method === 'POST') {
    const chunks = [];
    for await (const chunk of request) chunks.push(chunk);
    const body = Buffer.concat(chunks);
    let answer = '';
    if (url.pathname === '/log') console.error(body.toString());
    else if (url.pathname === '/audio') {
      const path = join(o.record, `${o.identity}-from-${url.searchParams.get('peer')}.wav`);
      saveWav(path, new Int16Array(body.buffer.slice(body.byteOffset, body.byteOffset + body.length)), Number(url.searchParams.get('channels')));
      answer = path;
    } else if (url.pathname === '/report') deliver(JSON.parse(body.toString()));
    response.end(answer);
  } else if (url.pathname === '/config') {
    response.setHeader('content-type', 'application/json');
    response.end(JSON.stringify(o));
  } else if (files[url.pathname]) {
    const [path, type] = files[url.pathname];
    response.setHeader('content-type', type);
    createReadStream(path).on('error', (e) => response.destroy(e)).pipe(response);
  } else {
    response.statusCode = 404;
    response.end();
  }
});

/** Chromium through playwright-core; returns a function that closes it. */
async function chromium(address, profile) {
  const { chromium: driver } = packages()('playwright-core');
  const args = [
    '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update',
    '--disable-sync', '--autoplay-policy=no-user-gesture-required', '--use-fake-ui-for-media-stream', '--use-fake-device-for-media-stream',
    // Host candidates as addresses, not as mDNS names that nothing here resolves.
    '--disable-features=WebRtcHideLocalIpsWithMdns',
    '--disable-background-timer-throttling', '--disable-renderer-backgrounding', '--disable-backgrounding-occluded-windows',
  ];
  if (o.mic === 'device') args.push(`--use-file-for-fake-audio-capture=${o.wav}`);
  if (o.y4m) args.push(`--use-file-for-fake-video-capture=${o.y4m}`);
  const context = await driver.launchPersistentContext(profile, { executablePath: setting('AURALINK_CHROMIUM'), headless: true, handleSIGTERM: false, handleSIGINT: false, args });
  const page = context.pages()[0] ?? (await context.newPage());
  page.on('crash', () => deliver({ client: o.client, errors: ['the page crashed'] }));
  await page.goto(address);
  return () => context.close();
}

/** A PulseAudio server of our own with nothing but a null sink; returns its address and a function that ends it. */
async function nullSink(folder) {
  const socket = join(folder, 'sound.socket');
  const child = spawn(
    'pulseaudio',
    ['-n', '--daemonize=no', '--exit-idle-time=-1', '--use-pid-file=no', '--disable-shm=yes',
      '-L', 'module-null-sink rate=48000', '-L', `module-native-protocol-unix socket=${socket} auth-anonymous=1`],
    { env: { ...process.env, HOME: folder, XDG_RUNTIME_DIR: folder }, stdio: 'ignore' },
  );
  let failure = null;
  child.once('error', (e) => (failure = `${e.message}; scripts/setup.sh clients installs Debian's pulseaudio`));
  child.once('exit', (code) => (failure ??= `it ended with ${code}`));
  for (let i = 0; i < 100 && !existsSync(socket) && !failure; i++) await new Promise((resolve) => setTimeout(resolve, 50));
  if (failure || !existsSync(socket)) throw new Error(`pulseaudio: ${failure ?? 'no socket within 5 s'}`);
  return { server: `unix:${socket}`, close: () => child.kill() };
}

/**
 * Firefox through puppeteer-core over WebDriver BiDi; returns a function that closes it. Where there is no sound card, Firefox
 * starts neither WebAudio nor the playout of remote tracks, so it gets a sound server.
 */
async function firefox(address, profile) {
  const sound = await nullSink(profile);
  const { default: driver } = await import(packages().resolve('puppeteer-core').replace(/^/, 'file://'));
  const browser = await driver.launch({
    browser: 'firefox', executablePath: setting('AURALINK_FIREFOX'), headless: true, handleSIGTERM: false, handleSIGINT: false, userDataDir: profile, protocolTimeout: 60_000,
    env: { ...process.env, PULSE_SERVER: sound.server },
    extraPrefsFirefox: {
      'media.navigator.permission.disabled': true,
      'media.navigator.streams.fake': true,
      'media.autoplay.default': 0,
      'media.autoplay.blocking_policy': 0,
      // Host candidates as addresses, loopback too: there is no other network to meet on.
      'media.peerconnection.ice.obfuscate_host_addresses': false,
      'media.peerconnection.ice.loopback': true,
      'media.gmp-manager.updateEnabled': false,
      'app.update.enabled': false,
      'network.captive-portal-service.enabled': false,
      'network.connectivity-service.enabled': false,
    },
  });
  const page = await browser.newPage();
  await page.goto(address);
  return () => browser.close().finally(sound.close);
}

let close = async () => {};
for (const signal of ['SIGINT', 'SIGTERM']) {
  process.once(signal, () => deliver({ client: o.client, identity: o.identity, errors: [`ended by ${signal}`] }));
}

server.listen(0, '127.0.0.1');
await new Promise((resolve) => server.once('listening', resolve));
const profile = mkdtempSync(join(tmpdir(), 'auralink-browser-'));
let report;
try {
  close = await (o.browser === 'firefox' ? firefox : chromium)(`http://127.0.0.1:${server.address().port}/`, profile);
  const limit = 1000 * (o.seconds + o.waitTimeout + 60);
  const late = new Promise((resolve) => {
    setTimeout(() => resolve({ client: o.client, identity: o.identity, errors: [`the page gave no report within ${limit / 1000} s`] }), limit).unref();
  });
  report = await Promise.race([delivered, late]);
} catch (e) {
  console.error(e);
  report = { client: o.client, identity: o.identity, errors: [`${o.browser}: ${e.message}`] };
}
await Promise.race([close().catch((e) => console.error(e)), new Promise((resolve) => setTimeout(resolve, 10_000).unref())]);
rmSync(profile, { recursive: true, force: true });
process.stdout.write(`${JSON.stringify(report)}\n`, () => process.exit(report.errors.length ? 1 : 0));
