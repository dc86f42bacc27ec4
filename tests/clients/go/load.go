package main

import (
	"encoding/binary"
	"fmt"
	"math"
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
)

// loadHeader is what a load packet's payload starts with: a valid Opus TOC byte, a mark, the speaker's packet counter and the
// time of sending in Unix nanoseconds, and the speaker's number. The rest is filler, which no decoder would accept: a proxy has to pass it untouched.
const loadHeader = 1 + 3 + 4 + 8 + 4

var loadMark = [3]byte{'A', 'L', 'T'}

type loadReport struct {
	Client       string   `json:"client"`
	Participants int      `json:"participants"`
	Joined       int      `json:"joined"`
	Speakers     int      `json:"speakers"`
	Rooms        int      `json:"rooms"`
	Seconds      float64  `json:"seconds"`
	ConnectP50   float64  `json:"connect_ms_p50"`
	ConnectP99   float64  `json:"connect_ms_p99"`
	ConnectMax   float64  `json:"connect_ms_max"`
	Pairs        int      `json:"pairs"`
	PairsHeard   int      `json:"pairs_heard"`
	Sent         uint64   `json:"packets_sent"`
	Expected     uint64   `json:"packets_expected"`
	Received     uint64   `json:"packets_received"`
	Lost         uint64   `json:"packets_lost"`
	Foreign      uint64   `json:"packets_foreign"`
	LatencyP50   float64  `json:"latency_ms_p50"`
	LatencyP90   float64  `json:"latency_ms_p90"`
	LatencyP99   float64  `json:"latency_ms_p99"`
	LatencyMax   float64  `json:"latency_ms_max"`
	LateTicksMs  float64  `json:"sender_late_ms_max"`
	Reconnects   int64    `json:"reconnects"`
	Disconnects  int64    `json:"disconnects"`
	Rate         uint64   `json:"packets_received_per_second"`
	Errors       []string `json:"errors"`
}

// pair counts what one participant received from one speaker. Only its reading goroutine writes it.
type pair struct {
	speaker   int
	received  uint64
	any       bool
	foreign   uint64
	histogram histogram
}

// span is the counters of the packets that a speaker sent while they were counted: from the first to before `end`.
type span struct {
	first, end atomic.Uint32
}

// histogram counts latencies in buckets 2.5 % wide, from 1 µs to about 20 s.
type histogram [700]uint32

func (h *histogram) add(d time.Duration) {
	us := max(1, float64(d.Nanoseconds())/1000)
	h[min(len(h)-1, int(math.Log(us)/math.Log(1.025)))]++
}

// quantile returns the upper bound in ms of the bucket in which the part `q` of all counts is reached.
func (h *histogram) quantile(q float64) float64 {
	var total, seen uint64
	for _, n := range h {
		total += uint64(n)
	}
	if total == 0 {
		return 0
	}
	for i, n := range h {
		seen += uint64(n)
		if float64(seen) >= q*float64(total) {
			return round(math.Pow(1.025, float64(i+1))/1000, 3)
		}
	}
	return 0
}

type loader struct {
	o           *options
	mu          sync.Mutex
	pairs       []*pair
	errs        []string
	spans       []span
	counting    atomic.Bool
	listening   atomic.Bool
	stop        chan struct{}
	sent        atomic.Uint64
	lateNs      atomic.Int64
	reconnects  atomic.Int64
	disconnects atomic.Int64
	leaving     atomic.Bool
}

// runLoad joins `load` participants, lets the speakers among them send for `seconds`, and counts per speaker and listener.
func runLoad(o *options) (*loadReport, []string) {
	lksdk.SetLogger(protoLogger.GetDiscardLogger())
	l := &loader{o: o, stop: make(chan struct{}), spans: make([]span, o.speakers)}
	rooms := make([]*lksdk.Room, o.load)
	times := make([]float64, o.load)
	var joining sync.WaitGroup
	begin := time.Now()
	for i := range o.load {
		time.Sleep(time.Until(begin.Add(time.Duration(float64(i) / o.joinRate * float64(time.Second)))))
		joining.Add(1)
		go func() {
			defer joining.Done()
			start := time.Now()
			room, err := l.join(i)
			if err != nil {
				l.fail("participant %d: %v", i, err)
				return
			}
			rooms[i], times[i] = room, float64(time.Since(start).Microseconds())/1000
		}()
	}
	joining.Wait()
	r := &loadReport{Client: "go-load", Participants: o.load, Rooms: o.rooms, Errors: []string{}}
	inRoom := make([]int, o.rooms)
	var connects []float64
	for i, room := range rooms {
		if room != nil {
			r.Joined++
			inRoom[i%o.rooms]++
			connects = append(connects, times[i])
		}
	}
	fmt.Fprintf(os.Stderr, "%d of %d joined in %v\n", r.Joined, o.load, time.Since(begin).Round(time.Millisecond))
	tracks := l.publish(rooms)
	for i := range tracks {
		if tracks[i] != nil {
			r.Speakers++
			r.Pairs += inRoom[i%o.rooms] - 1
			go l.speak(tracks[i], i)
		}
	}
	l.warmUp(r.Pairs)
	callBegins()
	l.listening.Store(true)
	l.counting.Store(true)
	started := time.Now()
	time.Sleep(o.seconds)
	l.counting.Store(false)
	r.Seconds = round(time.Since(started).Seconds(), 2)
	close(l.stop)
	// What was sent until now is still on its way.
	time.Sleep(300 * time.Millisecond)
	l.listening.Store(false)
	l.leave(rooms)
	l.total(r)
	sort.Float64s(connects)
	if n := len(connects); n > 0 {
		r.ConnectP50, r.ConnectP99, r.ConnectMax = round(connects[n/2], 1), round(connects[n*99/100], 1), round(connects[n-1], 1)
	}
	return r, r.Errors
}

func (l *loader) fail(format string, a ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	// One line a kind would hide how many; a thousand lines would hide the rest.
	if len(l.errs) < 20 {
		l.errs = append(l.errs, fmt.Sprintf(format, a...))
	}
}

// join connects participant `i`, into room `i` modulo the number of rooms.
func (l *loader) join(i int) (*lksdk.Room, error) {
	room := fmt.Sprintf("%s-%d", l.o.room, i%l.o.rooms)
	token, err := l.o.makeToken(room, fmt.Sprintf("%s-%d", l.o.identity, i))
	if err != nil {
		return nil, err
	}
	return lksdk.ConnectToRoomWithToken(l.o.url, token, &lksdk.RoomCallback{
		OnReconnecting: func() { l.reconnects.Add(1) },
		OnDisconnected: func() {
			if !l.leaving.Load() {
				l.disconnects.Add(1)
			}
		},
		ParticipantCallback: lksdk.ParticipantCallback{
			OnTrackSubscribed: func(track *webrtc.TrackRemote, _ *lksdk.RemoteTrackPublication, _ *lksdk.RemoteParticipant) {
				go l.listen(track)
			},
		},
	}, lksdk.WithConnectTimeout(20*time.Second), lksdk.WithLogger(protoLogger.GetDiscardLogger()))
}

// publish makes the first `speakers` participants publish a track each.
func (l *loader) publish(rooms []*lksdk.Room) []*webrtc.TrackLocalStaticRTP {
	tracks := make([]*webrtc.TrackLocalStaticRTP, l.o.speakers)
	limit := make(chan struct{}, 8)
	var all sync.WaitGroup
	for i := range tracks {
		if rooms[i] == nil {
			continue
		}
		all.Add(1)
		limit <- struct{}{}
		go func() {
			defer func() { <-limit; all.Done() }()
			codec := webrtc.RTPCodecCapability{MimeType: webrtc.MimeTypeOpus, ClockRate: rate, Channels: 2}
			track, err := webrtc.NewTrackLocalStaticRTP(codec, fmt.Sprintf("TR_load%d", i), "load")
			if err == nil {
				_, err = rooms[i].LocalParticipant.PublishTrack(track, &lksdk.TrackPublicationOptions{Source: livekit.TrackSource_MICROPHONE})
			}
			if err != nil {
				l.fail("speaker %d: publish: %v", i, err)
				return
			}
			tracks[i] = track
		}()
	}
	all.Wait()
	return tracks
}

// speak sends its packets every 20 ms until the end.
func (l *loader) speak(track *webrtc.TrackLocalStaticRTP, seed int) {
	payload := make([]byte, l.o.packetBytes)
	payload[0] = 0x78 // CELT, fullband, 20 ms, mono, one frame
	copy(payload[1:], loadMark[:])
	for i := loadHeader; i < len(payload); i++ {
		payload[i] = byte(i*37 + seed)
	}
	p := &rtp.Packet{Header: rtp.Header{Version: 2, SequenceNumber: uint16(seed * 977), Timestamp: uint32(seed) * 12345}, Payload: payload}
	// Speakers start at different phases of the 20 ms, as people's devices do.
	start := time.Now().Add(time.Duration(seed%20) * time.Millisecond)
	for counter := uint32(0); ; counter++ {
		due := start.Add(time.Duration(counter) * 20 * time.Millisecond / time.Duration(l.o.perTick))
		select {
		case <-l.stop:
			return
		case <-time.After(time.Until(due)):
		}
		now := time.Now()
		if late := now.Sub(due).Nanoseconds(); l.counting.Load() && late > l.lateNs.Load() {
			l.lateNs.Store(late)
		}
		binary.BigEndian.PutUint32(payload[4:], counter)
		binary.BigEndian.PutUint64(payload[8:], uint64(now.UnixNano()))
		binary.BigEndian.PutUint32(payload[16:], uint32(seed))
		p.SequenceNumber++
		p.Timestamp += uint32(960 / l.o.perTick)
		counting := l.counting.Load()
		if counting {
			if l.spans[seed].end.Load() == 0 {
				l.spans[seed].first.Store(counter)
			}
			l.spans[seed].end.Store(counter + 1)
		}
		if err := track.WriteRTP(p); err == nil && counting {
			l.sent.Add(1)
		}
	}
}

// listen counts one speaker's packets at one participant.
func (l *loader) listen(track *webrtc.TrackRemote) {
	c := &pair{speaker: -1}
	l.mu.Lock()
	l.pairs = append(l.pairs, c)
	l.mu.Unlock()
	buffer := make([]byte, 1500)
	var p rtp.Packet
	for {
		n, _, err := track.Read(buffer)
		if err != nil {
			return
		}
		now := time.Now()
		if !l.listening.Load() {
			c.any = true
		}
		if p.Unmarshal(buffer[:n]) != nil || len(p.Payload) < loadHeader || [3]byte(p.Payload[1:4]) != loadMark {
			if l.counting.Load() {
				c.foreign++
			}
			continue
		}
		speaker := int(binary.BigEndian.Uint32(p.Payload[16:]))
		if speaker >= len(l.spans) {
			c.foreign++
			continue
		}
		c.speaker = speaker
		counter, span := binary.BigEndian.Uint32(p.Payload[4:]), &l.spans[speaker]
		if !l.listening.Load() || counter < span.first.Load() || counter >= span.end.Load() {
			continue
		}
		c.received++
		c.histogram.add(now.Sub(time.Unix(0, int64(binary.BigEndian.Uint64(p.Payload[8:])))))
	}
}

// warmUp waits until every listener hears every speaker of its room, at most 30 s.
func (l *loader) warmUp(pairs int) {
	deadline := time.Now().Add(30 * time.Second)
	for time.Now().Before(deadline) {
		l.mu.Lock()
		n := len(l.pairs)
		l.mu.Unlock()
		if n >= pairs {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	time.Sleep(time.Second)
}

func (l *loader) leave(rooms []*lksdk.Room) {
	l.leaving.Store(true)
	var all sync.WaitGroup
	for _, room := range rooms {
		if room != nil {
			all.Add(1)
			go func() {
				defer all.Done()
				room.Disconnect()
			}()
		}
	}
	all.Wait()
}

// total adds the pairs up. Expected is all that the pair's speaker sent while packets were counted, whether or not the listener
// has heard to the end of it.
func (l *loader) total(r *loadReport) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var h histogram
	for _, c := range l.pairs {
		r.Foreign += c.foreign
		if c.speaker >= 0 {
			span := &l.spans[c.speaker]
			r.Expected += uint64(span.end.Load() - span.first.Load())
		}
		if c.received == 0 {
			continue
		}
		r.PairsHeard++
		r.Received += c.received
		for i, n := range c.histogram {
			h[i] += n
		}
	}
	if r.Expected > r.Received {
		r.Lost = r.Expected - r.Received
	}
	r.Sent = l.sent.Load()
	r.Rate = uint64(float64(r.Received) / r.Seconds)
	r.LatencyP50, r.LatencyP90, r.LatencyP99, r.LatencyMax = h.quantile(0.5), h.quantile(0.9), h.quantile(0.99), h.quantile(1)
	r.LateTicksMs = round(float64(l.lateNs.Load())/1e6, 2)
	r.Reconnects, r.Disconnects = l.reconnects.Load(), l.disconnects.Load()
	r.Errors = append(r.Errors, l.errs...)
	if r.Joined < r.Participants {
		r.Errors = append(r.Errors, fmt.Sprintf("%d of %d joined", r.Joined, r.Participants))
	}
	if r.PairsHeard < r.Pairs {
		r.Errors = append(r.Errors, fmt.Sprintf("%d of %d pairs heard anything", r.PairsHeard, r.Pairs))
	}
	if len(r.Errors) > 0 {
		fmt.Fprintln(os.Stderr, strings.Join(r.Errors, "\n"))
	}
}
