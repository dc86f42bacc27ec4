// LiveKit test client on server-sdk-go (Pion): one checking participant, or a load of many cheap ones.
// The command line and the report are specified in ../README.md.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/livekit/protocol/auth"
)

// options is the command line, resolved.
type options struct {
	url, token, key, secret, room, identity string
	seconds                                 time.Duration
	tone                                    float64
	wav                                     string
	stereo, noDTX                           bool
	videoWidth, videoHeight                 int
	videoCodec                              string
	dataCount, dataBytes                    int
	e2ee, record, scenario                  string
	scenarioAt, waitTimeout                 time.Duration
	waitPeers                               int

	load, speakers, rooms int
	joinRate              float64
	packetBytes           int
	perTick               int
	relay                 string

	whip bool
}

// usage ends the process because of a malformed command line.
func usage(format string, a ...any) {
	fmt.Fprintf(os.Stderr, format+"; see tests/clients/README.md\n", a...)
	os.Exit(2)
}

func parse() *options {
	o := &options{}
	f := flag.CommandLine
	f.StringVar(&o.url, "url", "ws://127.0.0.1:7880", "ws(s):// address of LiveKit or of the sidecar")
	f.StringVar(&o.token, "token", "", "JWT; or give --key, --secret, --room and --identity")
	f.StringVar(&o.key, "key", "devkey", "")
	f.StringVar(&o.secret, "secret", "secret-of-at-least-32-chars-for-auralink-tests", "")
	f.StringVar(&o.room, "room", "test", "")
	f.StringVar(&o.identity, "identity", fmt.Sprintf("go-%d", os.Getpid()), "")
	seconds := f.Float64("seconds", 10, "length of the call, counted from when all peers are there")
	audio := f.String("audio", "none", "none | tone:HZ | wav:PATH")
	f.BoolVar(&o.stereo, "stereo", false, "two channels; a tone is 1.5 times as high on the right")
	f.Bool("no-red", false, "accepted; the Go SDK never publishes RED")
	f.BoolVar(&o.noDTX, "no-dtx", false, "publish Opus without DTX")
	video := f.String("video", "none", "none | WxH (test picture)")
	f.StringVar(&o.videoCodec, "video-codec", "vp8", "vp8 | vp9")
	f.Int("simulcast", 0, "accepted; this client publishes one layer")
	data := f.String("data", "0:0", "COUNT:BYTES reliable messages, and COUNT lossy ones of 200 bytes")
	f.StringVar(&o.e2ee, "e2ee", "", "shared key of end-to-end encryption (audio only)")
	pc := f.String("pc", "dual", "dual; this SDK has no single peer connection")
	f.StringVar(&o.record, "record", "", "folder for WAV files of the audio received, one per peer")
	f.Bool("record-video", false, "not supported")
	f.StringVar(&o.scenario, "scenario", "none", "none, resume, full-reconnect, server-leave, node-failure, migration, speaker")
	at := f.Float64("scenario-at", 3, "seconds into the call")
	f.IntVar(&o.waitPeers, "wait-peers", 1, "participants to wait for before the call starts")
	wait := f.Float64("wait-timeout", 60, "seconds to wait for them")
	f.IntVar(&o.load, "load", 0, "run this many participants instead of one")
	f.IntVar(&o.speakers, "speakers", 1, "load: how many of them publish, spread evenly over the rooms")
	f.IntVar(&o.rooms, "rooms", 1, "load: rooms to spread them over, named ROOM-0, ROOM-1, ...")
	f.Float64Var(&o.joinRate, "join-rate", 20, "load: joins a second")
	f.IntVar(&o.packetBytes, "packet-bytes", 80, "load: payload bytes of each 20 ms packet")
	f.IntVar(&o.perTick, "per-tick", 1, "load: packets of each speaker in 20 ms, spread evenly")
	f.StringVar(&o.relay, "relay", "", "load: calls of two peer connections of this process through rtpengine, whose control port is HOST:PORT, or none")
	f.BoolVar(&o.whip, "whip", false, "publish by WHIP instead of LiveKit's signalling")
	f.Parse(os.Args[1:])
	if f.NArg() > 0 {
		usage("unexpected argument %s", f.Arg(0))
	}
	duration := func(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
	o.seconds, o.scenarioAt, o.waitTimeout = duration(*seconds), duration(*at), duration(*wait)
	switch {
	case strings.HasPrefix(*audio, "tone:"):
		hz, err := strconv.ParseFloat((*audio)[5:], 64)
		if err != nil || hz <= 0 {
			usage("--audio tone:HZ needs a positive frequency")
		}
		o.tone = hz
	case strings.HasPrefix(*audio, "wav:"):
		o.wav = (*audio)[4:]
		if _, err := os.Stat(o.wav); err != nil {
			usage("--audio: %v (scripts/setup.sh makes the speech files)", err)
		}
	case *audio != "none":
		usage("--audio takes none, tone:HZ or wav:PATH")
	}
	if *video != "none" {
		if n, err := fmt.Sscanf(*video, "%dx%d", &o.videoWidth, &o.videoHeight); err != nil || n != 2 {
			usage("--video takes none or WIDTHxHEIGHT")
		}
		if o.videoCodec != "vp8" && o.videoCodec != "vp9" {
			usage("--video-codec %s: the Go client publishes vp8 and vp9", o.videoCodec)
		}
	}
	if n, err := fmt.Sscanf(*data, "%d:%d", &o.dataCount, &o.dataBytes); err != nil || n != 2 {
		usage("--data takes COUNT:BYTES")
	}
	if o.dataCount > 0 && o.dataBytes < dataHeader {
		usage("--data: BYTES is at least %d, the size of the header", dataHeader)
	}
	if *pc != "dual" {
		usage("--pc %s: server-sdk-go 2.16 has dual peer connections only", *pc)
	}
	if o.scenario != "none" && o.load == 0 {
		if _, ok := scenarios[o.scenario]; !ok {
			usage("--scenario %s is not one of the Go SDK's", o.scenario)
		}
	}
	if o.load > 0 && (o.rooms < 1 || o.speakers < 0 || o.speakers > o.load || o.packetBytes < loadHeader || o.joinRate <= 0) {
		usage("--load: needs rooms >= 1, 0 <= speakers <= participants, packet-bytes >= %d, join-rate > 0", loadHeader)
	}
	if o.perTick < 1 || o.perTick > 20 {
		usage("--per-tick: 1 to 20")
	}
	if o.relay != "" && o.load == 0 {
		usage("--relay needs --load, the number of calls")
	}
	if o.whip {
		if err := checkWhip(o); err != nil {
			usage("%v", err)
		}
	}
	if o.record != "" {
		if err := os.MkdirAll(o.record, 0o755); err != nil {
			usage("--record: %v", err)
		}
	}
	return o
}

// makeToken returns the token given, or one for `identity` in `room` signed with key and secret.
func (o *options) makeToken(room, identity string) (string, error) {
	if o.token != "" {
		return o.token, nil
	}
	return auth.NewAccessToken(o.key, o.secret).
		SetVideoGrant(&auth.VideoGrant{RoomJoin: true, Room: room}).
		SetIdentity(identity).
		SetValidFor(time.Hour).
		ToJWT()
}

func main() {
	o := parse()
	var report any
	var errs []string
	if o.relay != "" {
		report, errs = runRelay(o)
	} else if o.load > 0 {
		report, errs = runLoad(o)
	} else if o.whip {
		report, errs = runWhip(o)
	} else {
		report, errs = runClient(o)
	}
	line, err := json.Marshal(report)
	if err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
	fmt.Println(string(line))
	if len(errs) > 0 {
		os.Exit(1)
	}
}
