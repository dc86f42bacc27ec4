package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/livekit/protocol/livekit"
	protoLogger "github.com/livekit/protocol/logger"
	lksdk "github.com/livekit/server-sdk-go/v2"
	"github.com/pion/rtp"
	"github.com/pion/webrtc/v4"
	"github.com/pion/webrtc/v4/pkg/media"
	"github.com/pion/webrtc/v4/pkg/media/oggwriter"
)

// scenarios maps the common names to the SDK's; a node failure is what makes this SDK reconnect in full.
var scenarios = map[string]lksdk.SimulateScenario{
	"resume":         lksdk.SimulateSignalReconnect,
	"full-reconnect": lksdk.SimulateNodeFailure,
	"node-failure":   lksdk.SimulateNodeFailure,
	"server-leave":   lksdk.SimulateServerLeave,
	"migration":      lksdk.SimulateMigration,
	"speaker":        lksdk.SimulateSpeakerUpdate,
}

// settle is the time between the last peer's arrival and the first data message, for its data channels to open.
const settle = time.Second

type iceReport struct {
	PC            string  `json:"pc"`
	Local         string  `json:"local"`
	Remote        string  `json:"remote"`
	Protocol      string  `json:"protocol"`
	BytesSent     uint64  `json:"bytes_sent"`
	BytesReceived uint64  `json:"bytes_received"`
	RttMs         float64 `json:"rtt_ms"`
}

type videoReport struct {
	From   string  `json:"from"`
	Frames int     `json:"frames"`
	Width  *int    `json:"width"`
	Height *int    `json:"height"`
	Codec  string  `json:"codec"`
	Y4m    *string `json:"y4m"`
	// Seconds since 1970 of the first and the last picture, and the longest time between two.
	FirstAt *float64 `json:"first_at"`
	LastAt  *float64 `json:"last_at"`
	GapMs   int64    `json:"gap_ms"`
}

type clientReport struct {
	Client           string         `json:"client"`
	Identity         string         `json:"identity"`
	ConnectMs        *float64       `json:"connect_ms"`
	BeganAt          *float64       `json:"began_at"`
	EndedAt          *float64       `json:"ended_at"`
	Stalls           [][2]float64   `json:"stalls"`
	Audio            []audioReport  `json:"audio"`
	Video            []*videoReport `json:"video"`
	Data             []*dataLog     `json:"data"`
	Ice              []iceReport    `json:"ice"`
	RemoteCandidates []string       `json:"remote_candidates"`
	Reconnecting     int            `json:"reconnecting"`
	Reconnected      int            `json:"reconnected"`
	Disconnected     *string        `json:"disconnected"`
	ActiveSpeakers   int            `json:"active_speakers"`
	Errors           []string       `json:"errors"`
}

// heard is the audio of one peer: its packets as an Ogg file, over all tracks that it had.
type heard struct {
	ogg           bytes.Buffer
	writer        *oggwriter.OggWriter
	packets, lost int
	codec         string
	base, last    uint32
	lastAt        time.Time
	late          [][2]float64
}

type client struct {
	o       *options
	room    *lksdk.Room
	mu      sync.Mutex
	report  clientReport
	audio   map[string]*heard
	video   map[string]*videoReport
	data    map[string]*dataLog
	remotes map[string]bool
	key     []byte
	leaving atomic.Bool
	ended   chan struct{}
	once    sync.Once
}

func runClient(o *options) (*clientReport, []string) {
	if os.Getenv("AURALINK_CLIENT_DEBUG") == "" {
		lksdk.SetLogger(protoLogger.GetDiscardLogger())
	}
	c := &client{o: o, audio: map[string]*heard{}, video: map[string]*videoReport{}, data: map[string]*dataLog{},
		remotes: map[string]bool{}, ended: make(chan struct{})}
	c.report = clientReport{Client: "go", Identity: o.identity, Audio: []audioReport{}, Video: []*videoReport{}, Data: []*dataLog{},
		Ice: []iceReport{}, RemoteCandidates: []string{}, Errors: []string{}}
	stalls := watchStalls()
	if err := c.run(); err != nil {
		c.fail(err)
	}
	c.report.EndedAt = unixNow()
	c.report.Stalls = stalls()
	c.leaving.Store(true)
	c.end()
	if c.room != nil {
		c.room.Disconnect()
	}
	c.finish()
	return &c.report, c.report.Errors
}

func (c *client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Errors = append(c.report.Errors, err.Error())
}

func (c *client) end() { c.once.Do(func() { close(c.ended) }) }

func (c *client) run() error {
	o := c.o
	if o.e2ee != "" {
		key, err := lksdk.DeriveKeyFromString(o.e2ee)
		if err != nil {
			return err
		}
		c.key = key
	}
	token, err := o.makeToken(o.room, o.identity)
	if err != nil {
		return err
	}
	// Encoding takes a while: it is done before joining.
	var opus, pictures [][]byte
	if o.tone > 0 || o.wav != "" {
		if opus, err = opusFrames(o); err != nil {
			return err
		}
	}
	if o.videoWidth > 0 {
		if pictures, err = videoFrames(o); err != nil {
			return err
		}
	}
	start := time.Now()
	if c.room, err = lksdk.ConnectToRoomWithToken(o.url, token, c.callbacks(), lksdk.WithConnectTimeout(10*time.Second)); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	ms := round(float64(time.Since(start).Microseconds())/1000, 1)
	c.report.ConnectMs = &ms
	c.report.Identity = c.room.LocalParticipant.Identity()
	if err := c.publish(opus, pictures); err != nil {
		return err
	}
	if err := c.waitForPeers(); err != nil {
		return err
	}
	started := time.Now()
	c.report.BeganAt = callBegins()
	go c.sendData()
	if o.scenario != "none" {
		time.AfterFunc(o.scenarioAt, func() { c.room.Simulate(scenarios[o.scenario]) })
	}
	for time.Since(started) < o.seconds {
		c.pollStats()
		select {
		case <-c.ended:
			return errors.New("disconnected before the end")
		case <-time.After(min(time.Second, o.seconds-time.Since(started)+time.Millisecond)):
		}
	}
	c.pollStats()
	return nil
}

func (c *client) callbacks() *lksdk.RoomCallback {
	count := func(n *int) {
		c.mu.Lock()
		*n++
		c.mu.Unlock()
	}
	return &lksdk.RoomCallback{
		OnReconnecting: func() { count(&c.report.Reconnecting) },
		OnReconnected:  func() { count(&c.report.Reconnected) },
		OnDisconnectedWithReason: func(reason lksdk.DisconnectionReason) {
			if !c.leaving.Load() {
				text := string(reason)
				c.mu.Lock()
				c.report.Disconnected = &text
				c.mu.Unlock()
				c.end()
			}
		},
		OnActiveSpeakersChanged: func(speakers []lksdk.Participant) {
			for _, p := range speakers {
				if p.Identity() != c.report.Identity {
					count(&c.report.ActiveSpeakers)
					return
				}
			}
		},
		ParticipantCallback: lksdk.ParticipantCallback{
			OnTrackSubscribed: func(track *webrtc.TrackRemote, _ *lksdk.RemoteTrackPublication, p *lksdk.RemoteParticipant) {
				if track.Kind() == webrtc.RTPCodecTypeAudio {
					go c.receiveAudio(track, p.Identity())
				} else {
					go c.receiveVideo(track, p)
				}
			},
			OnTrackSubscriptionFailed: func(sid string, p *lksdk.RemoteParticipant) {
				c.fail(fmt.Errorf("subscription of %s from %s failed", sid, p.Identity()))
			},
			OnDataPacket: func(packet lksdk.DataPacket, from lksdk.DataReceiveParams) {
				user, ok := packet.(*lksdk.UserDataPacket)
				if !ok {
					return
				}
				c.mu.Lock()
				defer c.mu.Unlock()
				log := c.data[from.SenderIdentity]
				if log == nil {
					log = &dataLog{From: from.SenderIdentity, seen: map[[5]byte]bool{}}
					c.data[from.SenderIdentity] = log
				}
				log.add(user.Payload)
			},
		},
	}
}

func (c *client) publish(opus, pictures [][]byte) error {
	encryption := livekit.Encryption_NONE
	if c.key != nil {
		encryption = livekit.Encryption_GCM
	}
	if opus != nil {
		codec := webrtc.RTPCodecCapability{MimeType: webrtc.MimeTypeOpus, ClockRate: rate, Channels: 2}
		track, err := lksdk.NewLocalTrack(codec)
		if err != nil {
			return err
		}
		options := &lksdk.TrackPublicationOptions{Name: "microphone", Source: livekit.TrackSource_MICROPHONE,
			Stereo: c.o.stereo, DisableDTX: c.o.noDTX, Encryption: encryption}
		if _, err := c.room.LocalParticipant.PublishTrack(track, options); err != nil {
			return fmt.Errorf("publish audio: %w", err)
		}
		go c.write(track, opus, 20*time.Millisecond, true)
	}
	if pictures != nil {
		mime := map[string]string{"vp8": webrtc.MimeTypeVP8, "vp9": webrtc.MimeTypeVP9}[c.o.videoCodec]
		track, err := lksdk.NewLocalTrack(webrtc.RTPCodecCapability{MimeType: mime, ClockRate: 90000,
			RTCPFeedback: []webrtc.RTCPFeedback{{Type: "nack"}, {Type: "nack", Parameter: "pli"}}})
		if err != nil {
			return err
		}
		options := &lksdk.TrackPublicationOptions{Name: "camera", Source: livekit.TrackSource_CAMERA,
			VideoWidth: c.o.videoWidth, VideoHeight: c.o.videoHeight}
		if _, err := c.room.LocalParticipant.PublishTrack(track, options); err != nil {
			return fmt.Errorf("publish video: %w", err)
		}
		go c.write(track, pictures, time.Second/30, false)
	}
	return nil
}

// write sends frames in a loop at their pace until the call ends. Failures to send are what a reconnect looks like from
// here; the receiver counts what is missing.
func (c *client) write(track *lksdk.LocalTrack, frames [][]byte, every time.Duration, audio bool) {
	level := uint8(13) // -dBov of a sine at amplitude 0.3
	start := time.Now()
	for i := 0; ; i++ {
		frame := frames[i%len(frames)]
		if audio && c.key != nil {
			sealed, err := lksdk.EncryptGCMAudioSample(frame, c.key, 0)
			if err != nil {
				c.fail(err)
				return
			}
			frame = sealed
		}
		var options *lksdk.SampleWriteOptions
		if audio {
			options = &lksdk.SampleWriteOptions{AudioLevel: &level}
		}
		_ = track.WriteSample(media.Sample{Data: frame, Duration: every}, options)
		select {
		case <-c.ended:
			return
		case <-time.After(time.Until(start.Add(time.Duration(i+1) * every))):
		}
	}
}

func (c *client) sendData() {
	time.Sleep(settle)
	p := c.room.LocalParticipant
	for i := range c.o.dataCount {
		for _, reliable := range []bool{true, false} {
			size := lossyBytes
			if reliable {
				size = c.o.dataBytes
			}
			err := p.PublishDataPacket(&lksdk.UserDataPacket{Payload: dataMessage(reliable, i, size), Topic: "test"}, lksdk.WithDataPublishReliable(reliable))
			if err != nil && !c.leaving.Load() {
				c.fail(fmt.Errorf("data message %d: %w", i, err))
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (c *client) waitForPeers() error {
	deadline := time.Now().Add(c.o.waitTimeout)
	for {
		n := len(c.room.GetRemoteParticipants())
		if n >= c.o.waitPeers {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d of %d peers came within %v", n, c.o.waitPeers, c.o.waitTimeout)
		}
		select {
		case <-c.ended:
			return errors.New("disconnected while waiting for peers")
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (c *client) receiveAudio(track *webrtc.TrackRemote, peer string) {
	c.mu.Lock()
	h := c.audio[peer]
	if h == nil {
		h = &heard{}
		h.writer, _ = oggwriter.NewWith(&h.ogg, rate, 2)
		c.audio[peer] = h
	}
	h.codec = track.Codec().MimeType
	c.mu.Unlock()
	var previous uint16
	first := true
	var base uint32
	for {
		p, _, err := track.ReadRTP()
		if err != nil {
			return
		}
		c.mu.Lock()
		h.packets++
		if first {
			// A later track of the same peer continues the recording where the earlier one ended.
			base = p.Timestamp - h.last - 960
		} else if gap := p.SequenceNumber - previous; gap > 1 && gap < 1000 {
			h.lost += int(gap - 1)
		}
		first, previous = false, p.SequenceNumber
		if payload := c.open(p, h.codec); len(payload) > 0 {
			now, before := time.Now(), h.last
			h.last = p.Timestamp - base
			if !h.lastAt.IsZero() {
				// Later than its place in the stream says: nothing could be played meanwhile.
				due := h.lastAt.Add(time.Duration(int32(h.last-before)) * time.Second / rate)
				if late := now.Sub(due).Milliseconds(); late >= leastHoleMs {
					h.late = append(h.late, [2]float64{unix(h.lastAt), float64(late)})
				}
			}
			h.lastAt = now
			q := &rtp.Packet{Header: rtp.Header{SequenceNumber: p.SequenceNumber, Timestamp: h.last}, Payload: payload}
			// Packets go on coming while the report is being made, when the recording has ended.
			if h.writer == nil {
				c.mu.Unlock()
				return
			}
			if err := h.writer.WriteRTP(q); err != nil {
				c.report.Errors = append(c.report.Errors, "ogg: "+err.Error())
			}
		}
		c.mu.Unlock()
	}
}

// open returns the Opus frame of a packet, out of RED and decrypted; nil where there is none.
func (c *client) open(p *rtp.Packet, codec string) []byte {
	payload := p.Payload
	if strings.EqualFold(codec, "audio/red") {
		// RFC 2198: four-byte headers of older blocks (bit 7 set), one byte of the primary's, then the blocks in order.
		skip := 0
		for len(payload) >= 4 && payload[0]&0x80 != 0 {
			skip += int(payload[2]&3)<<8 | int(payload[3])
			payload = payload[4:]
		}
		if len(payload) < 1+skip {
			return nil
		}
		payload = payload[1+skip:]
	}
	if c.key != nil {
		plain, err := lksdk.DecryptGCMAudioSample(payload, c.key, c.room.SifTrailer())
		if err != nil {
			c.report.Errors = append(c.report.Errors, "decrypt: "+err.Error())
			return nil
		}
		return plain
	}
	return payload
}

func (c *client) receiveVideo(track *webrtc.TrackRemote, p *lksdk.RemoteParticipant) {
	c.mu.Lock()
	v := c.video[p.Identity()]
	if v == nil {
		v = &videoReport{From: p.Identity()}
		c.video[p.Identity()] = v
	}
	v.Codec = strings.ToLower(strings.TrimPrefix(track.Codec().MimeType, "video/"))
	c.mu.Unlock()
	p.WritePLI(track.SSRC())
	for {
		packet, _, err := track.ReadRTP()
		if err != nil {
			return
		}
		c.mu.Lock()
		// Padding, which the server sends to find out how much the path carries, is no picture.
		if packet.Marker && len(packet.Payload) > 0 {
			v.Frames++
			now := unixNow()
			if v.FirstAt == nil {
				v.FirstAt = now
			} else {
				v.GapMs = max(v.GapMs, int64((*now-*v.LastAt)*1000))
			}
			v.LastAt = now
		}
		if v.Codec == "vp8" {
			// The largest key frame: a track ends with black ones of 8x8 that the server itself writes.
			if w, h := vp8Size(packet.Payload); w > 0 && (v.Width == nil || w*h >= *v.Width**v.Height) {
				v.Width, v.Height = &w, &h
			}
		}
		c.mu.Unlock()
	}
}

// vp8Size reads the picture size out of the packet that starts a key frame (RFC 7741, RFC 6386 9.1); 0 for any other.
func vp8Size(b []byte) (width, height int) {
	if len(b) < 1 || b[0]&0x17 != 0x10 {
		return 0, 0
	}
	at := 1
	if b[0]&0x80 != 0 {
		if len(b) < 2 {
			return 0, 0
		}
		flags := b[1]
		at = 2
		if flags&0x80 != 0 {
			if len(b) <= at {
				return 0, 0
			}
			if b[at]&0x80 != 0 {
				at++
			}
			at++
		}
		if flags&0x40 != 0 {
			at++
		}
		if flags&0x30 != 0 {
			at++
		}
	}
	if len(b) < at+10 || b[at]&1 != 0 || b[at+3] != 0x9d || b[at+4] != 1 || b[at+5] != 0x2a {
		return 0, 0
	}
	return int(b[at+6]) | int(b[at+7]&0x3f)<<8, int(b[at+8]) | int(b[at+9]&0x3f)<<8
}

// pollStats keeps the selected pair of each peer connection, and every remote candidate ever seen.
func (c *client) pollStats() {
	var ice []iceReport
	for name, pc := range map[string]*webrtc.PeerConnection{
		"pub": c.room.LocalParticipant.GetPublisherPeerConnection(), "sub": c.room.LocalParticipant.GetSubscriberPeerConnection()} {
		if pc != nil {
			ice = append(ice, selectedPairs(name, pc, c.remotes)...)
		}
	}
	if len(ice) > 0 {
		sort.Slice(ice, func(i, j int) bool { return ice[i].PC < ice[j].PC })
		c.report.Ice = ice
	}
}

// selectedPairs is the pair that a peer connection uses; all its remote candidates go into `remotes`.
func selectedPairs(name string, pc *webrtc.PeerConnection, remotes map[string]bool) (ice []iceReport) {
	stats := pc.GetStats()
	addresses := map[string]webrtc.ICECandidateStats{}
	for _, s := range stats {
		if candidate, ok := s.(webrtc.ICECandidateStats); ok {
			addresses[candidate.ID] = candidate
			if candidate.Type == webrtc.StatsTypeRemoteCandidate {
				remotes[fmt.Sprintf("%s:%d", candidate.IP, candidate.Port)] = true
			}
		}
	}
	for _, s := range stats {
		pair, ok := s.(webrtc.ICECandidatePairStats)
		if !ok || !pair.Nominated || pair.State != webrtc.StatsICECandidatePairStateSucceeded {
			continue
		}
		local, remote := addresses[pair.LocalCandidateID], addresses[pair.RemoteCandidateID]
		ice = append(ice, iceReport{PC: name, Local: fmt.Sprintf("%s:%d", local.IP, local.Port),
			Remote: fmt.Sprintf("%s:%d", remote.IP, remote.Port), Protocol: local.Protocol,
			BytesSent: pair.BytesSent, BytesReceived: pair.BytesReceived, RttMs: round(pair.CurrentRoundTripTime*1000, 2)})
	}
	return ice
}

// finish decodes what was heard and fills in the report.
func (c *client) finish() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for peer, h := range c.audio {
		h.writer.Close()
		h.writer = nil
		r := audioReport{From: peer, Packets: h.packets, Lost: h.lost, Codec: strings.ToLower(strings.TrimPrefix(h.codec, "audio/"))}
		if h.packets > 0 {
			x, err := decodeOgg(h.ogg.Bytes())
			if err != nil {
				c.report.Errors = append(c.report.Errors, "audio of "+peer+": "+err.Error())
			}
			r.analyse(x, h.lastAt)
			r.Holes = append(r.Holes, h.late...)
			if c.o.record != "" {
				path, err := saveWav(c.o.record, c.report.Identity, peer, x)
				if err != nil {
					c.report.Errors = append(c.report.Errors, err.Error())
				}
				r.Wav = &path
			}
		}
		c.report.Audio = append(c.report.Audio, r)
	}
	for _, v := range c.video {
		c.report.Video = append(c.report.Video, v)
	}
	for _, d := range c.data {
		c.report.Data = append(c.report.Data, d)
	}
	for address := range c.remotes {
		c.report.RemoteCandidates = append(c.report.RemoteCandidates, address)
	}
	sort.Strings(c.report.RemoteCandidates)
	if len(c.report.Errors) > 0 {
		fmt.Fprintln(os.Stderr, strings.Join(c.report.Errors, "\n"))
	}
}
