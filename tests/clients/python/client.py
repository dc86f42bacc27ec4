"""LiveKit test client on the Python SDK (libwebrtc through the Rust FFI). Command line and report: ../README.md."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import re
import sys
import time
import traceback

import numpy as np
from livekit import api, rtc
from livekit.rtc import SimulateScenarioKind
from livekit.rtc._proto import video_frame_pb2

import common
import picture

SCENARIO_KINDS = {
    "resume": SimulateScenarioKind.SIMULATE_SIGNAL_RECONNECT,
    "full-reconnect": SimulateScenarioKind.SIMULATE_FULL_RECONNECT,
    "disconnect-on-resume": SimulateScenarioKind.SIMULATE_DISCONNECT_SIGNAL_ON_RESUME,
    "server-leave": SimulateScenarioKind.SIMULATE_SERVER_LEAVE,
    "node-failure": SimulateScenarioKind.SIMULATE_NODE_FAILURE,
    "migration": SimulateScenarioKind.SIMULATE_MIGRATION,
    "force-tcp": SimulateScenarioKind.SIMULATE_FORCE_TCP,
    "speaker": SimulateScenarioKind.SIMULATE_SPEAKER,
}

VIDEO_CODECS = {
    "vp8": video_frame_pb2.VideoCodec.VP8,
    "vp9": video_frame_pb2.VideoCodec.VP9,
    "av1": video_frame_pb2.VideoCodec.AV1,
    "h264": video_frame_pb2.VideoCodec.H264,
}

QUEUE_MS = 100
"""Milliseconds of sound between `send_audio` and the encoder."""

SETTLE = 1.0
"""Seconds between the last peer's arrival and the first data message, for its data channels to open."""


class Client:
    """One participant from connect to report."""

    def __init__(self, args) -> None:
        self.args = args
        self.room = rtc.Room()
        self.errors: list[str] = []
        self.tasks: list[asyncio.Task] = []
        self.audio: dict[str, list[np.ndarray]] = {}
        self.video: dict[str, dict] = {}
        self.data: dict[str, common.DataLog] = {}
        self.peers: set[str] = set()
        self.attributes: dict[str, dict[str, str]] = {}
        self.tracks: list[tuple] = []
        self.current: dict[tuple, str] = {}
        # Seconds of the monotonic clock, one for each block, at which the first sample was sent and heard.
        self.said_at: list[float] = []
        self.heard_at: dict[str, list[float]] = {}
        # Seconds since 1970 at which each block of a peer's came, and the call began and ended for this client.
        self.arrivals: dict[str, list[float]] = {}
        self.began_at: float | None = None
        self.ended_at: float | None = None
        self.stalls: list[list[float]] = []
        self.ssrc_owner: dict[int, str] = {}
        self.remote_candidates: set[str] = set()
        self.ice: list[dict] = []
        self.flows: dict[str, list[dict]] = {"inbound": [], "outbound": []}
        self.counts = {"reconnecting": 0, "reconnected": 0, "active_speakers": 0, "republished": 0}
        self.disconnected: str | None = None
        self.leaving = False
        self.ended = asyncio.Event()
        self.identity: str | None = None

    # Events

    def subscribe_events(self) -> None:
        room = self.room
        room.on("participant_connected", self.on_participant)
        room.on("participant_attributes_changed", lambda _, p: self.note_attributes(p))
        room.on("track_subscribed", self.on_track)
        room.on("data_received", self.on_data)
        room.on("reconnecting", lambda: self.count("reconnecting"))
        room.on("reconnected", lambda: self.count("reconnected"))
        room.on("local_track_republished", lambda *_: self.count("republished"))
        room.on("active_speakers_changed", self.on_speakers)
        room.on("disconnected", self.on_disconnected)
        room.on("track_subscription_failed", lambda p, sid, e: self.errors.append(f"subscription of {sid}: {e}"))
        if self.args.e2ee:
            room.on("e2ee_state_changed", self.on_e2ee)

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def on_participant(self, participant) -> None:
        self.peers.add(participant.identity)
        self.note_attributes(participant)

    def note_attributes(self, participant) -> None:
        if participant.identity != self.identity and participant.attributes:
            self.attributes[participant.identity] = dict(participant.attributes)

    def on_e2ee(self, participant, state) -> None:
        # KEY_RATCHETED and the like are fine; these two mean that media cannot be read.
        name = rtc.EncryptionState.Name(state) if hasattr(rtc.EncryptionState, "Name") else str(state)
        if "FAILED" in name or "MISSING" in name:
            self.errors.append(f"e2ee {participant.identity}: {name}")

    def on_speakers(self, speakers) -> None:
        if any(s.identity != self.identity for s in speakers):
            self.count("active_speakers")

    def on_disconnected(self, reason) -> None:
        if not self.leaving:
            self.disconnected = rtc.DisconnectReason.Name(reason) if reason is not None else "UNKNOWN"
            self.ended.set()

    def on_data(self, packet: rtc.DataPacket) -> None:
        peer = packet.participant.identity if packet.participant else ""
        self.data.setdefault(peer, common.DataLog()).add(bytes(packet.data))

    def on_track(self, track, publication, participant) -> None:
        self.tracks.append((track, participant.identity))
        # A peer that reconnects in full brings new tracks; the streams of its old ones go on with silence.
        self.current[(participant.identity, track.kind)] = track.sid
        receive = self.receive_audio if track.kind == rtc.TrackKind.KIND_AUDIO else self.receive_video
        self.tasks.append(asyncio.create_task(self.guard(receive(track, participant.identity))))

    async def guard(self, work) -> None:
        """Awaits `work` and keeps its failure for the report."""
        try:
            await work
        except asyncio.CancelledError:
            raise
        except Exception as e:  # noqa: BLE001 every failure belongs into the report
            traceback.print_exc()
            self.errors.append(f"{type(e).__name__}: {e}")

    # Receiving

    async def receive_audio(self, track, peer: str) -> None:
        channels = 2 if self.args.stereo else 1
        blocks, sid = self.audio.setdefault(peer, []), track.sid
        times, samples = self.heard_at.setdefault(peer, []), sum(map(len, blocks))
        arrivals = self.arrivals.setdefault(peer, [])
        stream = rtc.AudioStream.from_track(track=track, sample_rate=common.RATE, num_channels=channels)
        try:
            async for event in stream:
                if self.current[(peer, track.kind)] != sid:
                    break
                blocks.append(np.frombuffer(event.frame.data, np.int16).reshape(-1, channels).copy())
                samples += len(blocks[-1])
                times.append(time.monotonic() - samples / common.RATE)
                arrivals.append(time.time())
        finally:
            await stream.aclose()

    async def receive_video(self, track, peer: str) -> None:
        sid = track.sid
        seen = self.video.setdefault(peer, {"frames": 0, "width": 0, "height": 0, "ids": set(), "file": None, "first_at": None, "last_at": None, "gap_ms": 0})
        stream = rtc.VideoStream.from_track(track=track, format=rtc.VideoBufferType.I420)
        try:
            async for event in stream:
                if self.current[(peer, track.kind)] != sid:
                    break
                frame = event.frame
                seen["frames"] += 1
                now = time.time()
                seen["first_at"] = seen["first_at"] or now
                seen["gap_ms"] = max(seen["gap_ms"], round(1000 * (now - (seen["last_at"] or now))))
                seen["last_at"] = now
                # The largest layer that arrived: the first frames of a simulcast track are often a lower one.
                if frame.width * frame.height >= seen["width"] * seen["height"]:
                    seen["width"], seen["height"] = frame.width, frame.height
                luma = np.frombuffer(frame.data, np.uint8, frame.width * frame.height).reshape(frame.height, frame.width)
                number = picture.read_number(luma)
                if number is not None:
                    seen["ids"].add(number)
                if self.args.record and self.args.record_video:
                    if seen["file"] is None:
                        path = os.path.join(self.args.record, f"{self.identity}-from-{peer}.y4m")
                        seen["file"] = picture.NumberedY4m(path)
                    seen["file"].write(number, frame.width, frame.height, bytes(frame.data))
        finally:
            await stream.aclose()

    # Sending

    async def publish(self) -> None:
        a = self.args
        local = self.room.local_participant
        if a.tone is not None or a.wav:
            channels = 2 if a.stereo else 1
            source = rtc.AudioSource(common.RATE, channels, queue_size_ms=QUEUE_MS)
            track = rtc.LocalAudioTrack.create_audio_track("microphone", source)
            options = rtc.TrackPublishOptions(
                source=rtc.TrackSource.SOURCE_MICROPHONE, red=not a.no_red, dtx=not a.no_dtx
            )
            await local.publish_track(track, options)
            self.microphone = track
            self.tasks.append(asyncio.create_task(self.guard(self.send_audio(source, channels))))
        if a.video_size or a.y4m:
            pictures = picture.Y4mSource(a.y4m) if a.y4m else picture.Pattern(*a.video_size)
            source = rtc.VideoSource(pictures.width, pictures.height)
            track = rtc.LocalVideoTrack.create_video_track("camera", source)
            options = rtc.TrackPublishOptions(
                source=rtc.TrackSource.SOURCE_CAMERA,
                simulcast=bool(a.simulcast),
                video_codec=VIDEO_CODECS[a.video_codec],
            )
            await local.publish_track(track, options)
            self.tasks.append(asyncio.create_task(self.guard(self.send_video(source, pictures))))

    async def send_audio(self, source, channels: int) -> None:
        pcm = common.load_wav(self.args.wav, channels) if self.args.wav else None
        n, position = 480, 0
        while not self.ended.is_set():
            if pcm is None:
                block = common.tone_block(self.args.tone, channels, position, n)
            else:
                block = np.take(pcm, range(position, position + n), axis=0, mode="wrap")
            position += n
            # Waits while the source's queue is full, which is what keeps the pace.
            await source.capture_frame(rtc.AudioFrame(block.tobytes(), common.RATE, channels, n))
            self.said_at.append(time.monotonic() - position / common.RATE + QUEUE_MS / 1000)

    async def send_video(self, source, pictures) -> None:
        start, number = time.monotonic(), 0
        while not self.ended.is_set():
            data = await asyncio.to_thread(pictures.i420, number)
            source.capture_frame(
                rtc.VideoFrame(pictures.width, pictures.height, rtc.VideoBufferType.I420, data),
                timestamp_us=int((time.monotonic() - start) * 1e6),
            )
            number += 1
            late = time.monotonic() - start - number / pictures.fps
            if late > 0:
                number += int(late * pictures.fps)
            await asyncio.sleep(max(0.0, -late))

    async def send_data(self) -> None:
        local = self.room.local_participant
        for i in range(self.args.data_count):
            await local.publish_data(common.data_message(True, i, self.args.data_bytes), reliable=True, topic="test")
            await local.publish_data(common.data_message(False, i, common.LOSSY_BYTES), reliable=False, topic="test")
            await asyncio.sleep(0.02)

    # Statistics

    async def poll_stats(self) -> None:
        try:
            stats = await asyncio.wait_for(self.room.get_rtc_stats(), 5)
        except Exception as e:  # noqa: BLE001 stats are refused while the room reconnects
            print(f"stats: {e}", file=sys.stderr)
            return
        await self.find_owners()
        ice: list[dict] = []
        flows: dict[str, list[dict]] = {"inbound": [], "outbound": []}
        for pc, entries in (("pub", stats.publisher_stats), ("sub", stats.subscriber_stats)):
            by_id = {}
            for entry in entries:
                kind = entry.WhichOneof("stats")
                value = getattr(entry, kind)
                by_id[value.rtc.id] = (kind, value)
            label = "single" if self.args.pc == "single" else pc
            for kind, value in list(by_id.values()):
                if kind == "remote_candidate":
                    self.remote_candidates.add(f"{value.candidate.address}:{value.candidate.port}")
                elif kind == "transport":
                    pair = by_id.get(value.transport.selected_candidate_pair_id)
                    if pair:
                        ice.append(self.pair_report(label, pair[1].candidate_pair, by_id))
                elif kind in ("inbound_rtp", "outbound_rtp"):
                    flows[kind.split("_")[0]].append(self.flow_report(kind, value, by_id))
        # A peer that has left takes its statistics along: the last ones stay.
        self.ice = ice or self.ice
        for direction, found in flows.items():
            self.flows[direction] = found or self.flows[direction]

    async def find_owners(self) -> None:
        """Learns which peer an SSRC belongs to; the statistics of the whole connection don't say."""
        for track, peer in self.tracks:
            try:
                entries = await asyncio.wait_for(track.get_stats(), 2)
            except Exception:  # noqa: BLE001 a track of before a reconnect has none
                continue
            for entry in entries:
                if entry.WhichOneof("stats") == "inbound_rtp":
                    self.ssrc_owner[entry.inbound_rtp.stream.ssrc] = peer

    @staticmethod
    def pair_report(label: str, pair, by_id: dict) -> dict:
        local = by_id[pair.local_candidate_id][1].candidate
        remote = by_id[pair.remote_candidate_id][1].candidate
        return {
            "pc": label,
            "local": f"{local.address}:{local.port}",
            "remote": f"{remote.address}:{remote.port}",
            "protocol": local.protocol,
            "bytes_sent": pair.bytes_sent,
            "bytes_received": pair.bytes_received,
            "packets_sent": pair.packets_sent,
            "packets_received": pair.packets_received,
            "rtt_ms": round(pair.current_round_trip_time * 1000, 2),
        }

    def flow_report(self, kind: str, value, by_id: dict) -> dict:
        codec = by_id.get(value.stream.codec_id)
        out = {
            "kind": value.stream.kind,
            "codec": codec[1].codec.mime_type if codec else None,
            "ssrc": value.stream.ssrc,
        }
        if kind == "inbound_rtp":
            out |= {
                "from": self.ssrc_owner.get(value.stream.ssrc),
                "packets": value.received.packets_received,
                "lost": value.received.packets_lost,
                "bytes": value.inbound.bytes_received,
                "jitter_ms": round(value.received.jitter * 1000, 2),
                "concealed": value.inbound.concealed_samples,
                "frames": value.inbound.frames_decoded,
                "nack": value.inbound.nack_count,
                "pli": value.inbound.pli_count,
            }
        else:
            out |= {
                "rid": value.outbound.rid,
                "packets": value.sent.packets_sent,
                "bytes": value.sent.bytes_sent,
                "header_bytes": value.outbound.header_bytes_sent,
                "width": value.outbound.frame_width,
                "height": value.outbound.frame_height,
                "nack": value.outbound.nack_count,
                "pli": value.outbound.pli_count,
            }
        return out

    # The call

    async def run(self) -> None:
        a = self.args
        options = rtc.RoomOptions(auto_subscribe=True, dynacast=True, single_peer_connection=a.pc == "single")
        options.connect_timeout = a.connect_timeout
        if a.e2ee:
            options.encryption = rtc.E2EEOptions(
                key_provider_options=rtc.KeyProviderOptions(shared_key=a.e2ee.encode())
            )
        self.subscribe_events()
        self.tasks.append(asyncio.create_task(self.guard(self.watch_stalls())))
        start = time.monotonic()
        await self.room.connect(a.url, token(a), options)
        self.connect_ms = round((time.monotonic() - start) * 1000, 1)
        self.identity = self.room.local_participant.identity
        self.peers |= set(self.room.remote_participants)
        await self.publish()
        await self.wait_for_peers()
        started = time.monotonic()
        self.began_at = time.time()
        print("the call begins", file=sys.stderr, flush=True)
        if a.data_count:
            await asyncio.sleep(SETTLE)
            self.tasks.append(asyncio.create_task(self.guard(self.send_data())))
        if a.mute_seconds:
            self.tasks.append(asyncio.create_task(self.guard(self.mute(started))))
        if a.scenario != "none":
            self.tasks.append(asyncio.create_task(self.guard(self.simulate(started))))
        while time.monotonic() - started < a.seconds and not self.ended.is_set():
            await self.poll_stats()
            left = a.seconds - (time.monotonic() - started)
            try:
                await asyncio.wait_for(self.ended.wait(), max(0.01, min(1.0, left)))
            except asyncio.TimeoutError:
                pass
        if self.ended.is_set():
            self.errors.append(f"disconnected before the end: {self.disconnected}")
        else:
            await self.poll_stats()

    async def wait_for_peers(self) -> None:
        deadline = time.monotonic() + self.args.wait_timeout
        while len(self.peers) < self.args.wait_peers:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{len(self.peers)} of {self.args.wait_peers} peers came within {self.args.wait_timeout} s"
                )
            if self.ended.is_set():
                raise ConnectionError(f"disconnected while waiting for peers: {self.disconnected}")
            await asyncio.sleep(0.02)

    async def watch_stalls(self) -> None:
        """Notes when this process did not run for a while: [time at which it began, ms]."""
        step = 0.02
        while True:
            due = time.time() + step
            await asyncio.sleep(step)
            late = round(1000 * (time.time() - due))
            if late >= common.STALL_MS:
                self.stalls.append([round(due, 3), late])

    async def simulate(self, started: float) -> None:
        await asyncio.sleep(max(0.0, started + self.args.scenario_at - time.monotonic()))
        await self.room.simulate_scenario(SCENARIO_KINDS[self.args.scenario])

    async def mute(self, started: float) -> None:
        await asyncio.sleep(max(0.0, started + self.args.mute_at - time.monotonic()))
        self.microphone.mute()
        await asyncio.sleep(self.args.mute_seconds)
        self.microphone.unmute()

    async def leave(self) -> None:
        self.ended_at = time.time()
        self.leaving = True
        self.ended.set()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        try:
            await asyncio.wait_for(self.room.disconnect(), 5)
        except Exception as e:  # noqa: BLE001 leaving must not hide the report
            self.errors.append(f"disconnect: {type(e).__name__}: {e}")

    def report(self) -> dict:
        audio = []
        for peer, blocks in self.audio.items():
            pcm = np.concatenate(blocks) if blocks else np.zeros((0, 1), np.int16)
            path = None
            if self.args.record and len(pcm):
                path = os.path.join(self.args.record, f"{self.identity}-from-{peer}.wav")
                common.save_wav(path, pcm)
            heard_at = round(float(np.median(self.heard_at[peer])), 4) if self.heard_at[peer] else None
            sounds = common.sounds(blocks, self.arrivals[peer])
            audio.append({"from": peer, **common.analyse(pcm), **sounds, "wav": path, "heard_at": heard_at})
        video = []
        for peer, seen in self.video.items():
            codec = next((f["codec"] for f in self.flows["inbound"] if f["kind"] == "video" and f["from"] == peer), None)
            path = seen["file"].close() if seen["file"] else None
            video.append(
                {
                    "from": peer,
                    "frames": seen["frames"],
                    "width": seen["width"],
                    "height": seen["height"],
                    "codec": re.sub("^video/", "", codec).lower() if codec else None,
                    "numbered": len(seen["ids"]),
                    "y4m": path,
                    "first_at": seen["first_at"],
                    "last_at": seen["last_at"],
                    "gap_ms": seen["gap_ms"],
                }
            )
        return {
            "client": "python",
            "identity": self.identity,
            "connect_ms": getattr(self, "connect_ms", None),
            "began_at": self.began_at,
            "ended_at": self.ended_at,
            "stalls": self.stalls,
            "audio": audio,
            "video": video,
            "data": [log.report(peer) for peer, log in self.data.items()],
            "ice": self.ice,
            "remote_candidates": sorted(self.remote_candidates),
            **self.counts,
            "disconnected": self.disconnected,
            "attributes": self.attributes,
            "inbound": self.flows["inbound"],
            "outbound": self.flows["outbound"],
            "said_at": round(float(np.median(self.said_at)), 4) if self.said_at else None,
            "errors": self.errors,
        }


def token(a) -> str:
    """The token given, or one made from key and secret."""
    if a.token:
        return a.token
    return (
        api.AccessToken(a.key, a.secret)
        .with_identity(a.identity)
        .with_ttl(datetime.timedelta(hours=1))
        .with_grants(api.VideoGrants(room_join=True, room=a.room, can_update_own_metadata=a.own_metadata))
        .to_jwt()
    )


async def main() -> int:
    client = Client(common.check_args(common.parser("python").parse_args()))
    try:
        await client.run()
    except Exception as e:  # noqa: BLE001 every failure belongs into the report
        traceback.print_exc()
        client.errors.append(f"{type(e).__name__}: {e}")
    await client.leave()
    print(json.dumps(client.report()), flush=True)
    return 1 if client.errors else 0


if __name__ == "__main__":
    code = asyncio.run(main())
    sys.stdout.flush()
    # The FFI library's threads outlive the event loop; a normal exit may wait for them.
    os._exit(code)
